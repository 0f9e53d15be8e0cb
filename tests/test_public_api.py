"""What users may import and call. A change here breaks somebody: it belongs into CHANGELOG.md."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import ModuleType

import pytest

import specdec

SIGNATURES = {
    "generate": "(model: 'PreTrainedModel', inputs: 'Tensor | None' = None, *, "
    "drafter: 'Drafter | PreTrainedModel | str | Path | None' = 'lookup', rule: 'Rule' = 'auto', "
    "generator: 'torch.Generator | None' = None, stats: 'DecodeStats | None' = None, **kwargs: 'Any')"
    " -> 'Tensor | SpeculativeOutput'",
    "attach": "(model: 'PreTrainedModel', drafter: 'Drafter | PreTrainedModel | str | Path') -> 'PreTrainedModel'",
    "detach": "(model: 'PreTrainedModel') -> 'PreTrainedModel'",
    "load_drafter": "(spec: 'Drafter | PreTrainedModel | str | Path | None', model: 'PreTrainedModel')"
    " -> 'Drafter | None'",
    "Drafter.reset": "(self, batch_size: 'int', context: 'Context') -> 'None'",
    "Drafter.observe": "(self, committed: 'Committed') -> 'None'",
    "Drafter.propose": "(self, root: 'Tensor', params: 'SamplingParams', chooser: 'Chooser', room: 'int')"
    " -> 'TokenTree'",
    "Drafter.select": "(self, rows: 'list[int]') -> 'None'",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_stay_as_they_are(name: str):
    function = specdec
    for part in name.split("."):
        function = getattr(function, part)
    assert callable(function)
    assert str(inspect.signature(function)) == SIGNATURES[name]


def test_all_is_sorted_and_names_every_public_object():
    public = {
        name for name, value in vars(specdec).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert list(specdec.__all__) == sorted(specdec.__all__)
    assert set(specdec.__all__) == public | {"__version__"}


@pytest.mark.parametrize("name", [name for name in specdec.__all__ if name != "__version__"])
def test_every_public_object_and_its_public_methods_have_docstrings(name: str):
    public = getattr(specdec, name)
    documented = {name: public.__doc__}
    if inspect.isclass(public):
        # A dataclass without a docstring gets its signature as one.
        documented[name] = None if str(public.__doc__).startswith(f"{name}(") else public.__doc__
        documented |= {
            f"{name}.{member}": inspect.getdoc(value)
            for member, value in vars(public).items()
            if not member.startswith("_") and (inspect.isroutine(value) or isinstance(value, property))
        }
    missing = [key for key, text in documented.items() if not text]
    assert not missing, f"no docstring: {missing}"


def test_every_error_of_ours_is_a_value_error():
    errors = [getattr(specdec, name) for name in specdec.__all__ if inspect.isclass(getattr(specdec, name))]
    ours = {error for error in errors if issubclass(error, Exception)}
    assert all(issubclass(error, specdec.SpecdecError) for error in ours)
    assert issubclass(specdec.SpecdecError, ValueError)


def test_importing_specdec_loads_neither_the_command_line_nor_training():
    loaded = "import sys, specdec; print(*[m for m in sys.modules if m.startswith('specdec.')])"
    printed = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout.split()
    assert "specdec.api" in printed
    assert not [name for name in printed if name.startswith(("specdec.cli", "specdec.train"))]
