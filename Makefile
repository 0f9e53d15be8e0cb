# Everything runs in a .venv of the project's own. The first target that needs it sets it up, and again only
# after pyproject.toml or constraints.txt changed; afterwards nothing here touches the network.
#
#   make test PYTHON=python3.12      another interpreter (3.11 or newer)
#   make test TORCH_INDEX=           torch from pip's usual index, CUDA build included
#   make test SIDE_BY_SIDE=          one test after the other

VENV := .venv
READY := $(VENV)/.ready
UNFINISHED := $(VENV)/.unfinished
IN_VENV := $(VENV)/bin/python

SUITABLE := import sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11 python,\
	$(shell $(name) -c '$(SUITABLE)' 2>/dev/null && echo $(name))))

GPU := $(shell command -v nvidia-smi 2>/dev/null)

# PyPI's Linux build of torch brings several GB of CUDA packages. Without a GPU the CPU build is enough.
ifeq ($(shell uname -s):$(GPU),Linux:)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif

PIP := $(IN_VENV) -m pip --disable-pip-version-check --no-input install -c constraints.txt

# Tests run with one torch thread each, as many at once as there are cores; each process takes about 1.5 GB.
SIDE_BY_SIDE ?= -n logical --maxprocesses=4 --dist=worksteal

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check bench clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(READY)  ## plain and speculative decoding side by side, on the model that ships with the package
	@$(IN_VENV) -m specdec demo

test: $(READY)  ## the tests, without those marked slow or gpu
	$(IN_VENV) -m pytest $(SIDE_BY_SIDE) --durations=10

test-all: $(READY)  ## all tests, those marked gpu where there is one
	$(IN_VENV) -m pytest $(SIDE_BY_SIDE) --durations=10 -m "$(if $(GPU),,not gpu)"

check: $(READY)  ## lint, format and types
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m ruff format --check .
	$(IN_VENV) -m pyright

bench: $(READY)  ## tokens per second against plain and assisted generation, on the model that ships
	$(IN_VENV) scripts/bench_generate.py

clean:  ## remove the environment, caches and built files
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find specdec heads train scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A set-up that was killed leaves $(UNFINISHED) behind, and the next one starts from nothing: a package that was
# half unpacked can look installed. One that failed, without network say, leaves what was there before.
# torch goes first and by itself, so that nothing later chooses another build.
FAILED := { [ $$? -ge 128 ] || rm -f $(UNFINISHED); exit 1; }
$(READY): pyproject.toml constraints.txt $(IN_VENV)
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c '$(SUITABLE)' 2>/dev/null; then \
		echo "specdec needs Python 3.11 or newer with the venv module; found $(or $(PYTHON),`python3 --version 2>&1`)." >&2; \
		echo "Install one, or name it: make $(or $(firstword $(MAKECMDGOALS)),test) PYTHON=/path/to/python3.12" >&2; \
		exit 1; \
	fi
	@echo "Setting up $(VENV) with `$(PYTHON) --version` (once, a few minutes) ..."
	@if [ -e $(UNFINISHED) ] || ! $(IN_VENV) -c '$(SUITABLE)' 2>/dev/null || \
		! $(IN_VENV) -m pip --version >/dev/null 2>&1; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(UNFINISHED)
	@[ -x $(IN_VENV) ] || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch ..."
	@$(if $(TORCH_INDEX),$(PIP) --retries 1 --timeout 15 --index-url $(TORCH_INDEX) --no-deps torch || \
		echo "No torch from $(TORCH_INDEX); taking the one of pip's usual index.",:)
	@$(PIP) torch || $(FAILED)
	@echo "Installing specdec and its dependencies ..."
	@$(PIP) -e '.[dev]' || $(FAILED)
	@rm $(UNFINISHED) && touch $(READY)

# Not built by itself: a missing or dangling interpreter only makes $(READY) out of date.
$(IN_VENV):
