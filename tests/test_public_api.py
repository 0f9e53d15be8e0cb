"""What users may import and call. A change here breaks somebody: it belongs into CHANGELOG.md."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
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
    for name in specdec.__all__:
        getattr(specdec, name)  # a name that is imported when it is first used
    public = {
        name for name, value in vars(specdec).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    } - {"TYPE_CHECKING", "Any", "import_module"}
    assert list(specdec.__all__) == sorted(specdec.__all__)
    assert set(specdec.__all__) == public | {"__version__"}
    assert set(specdec.__all__) <= set(dir(specdec))


def test_type_checkers_see_what_is_imported_at_run_time():
    """The imports under TYPE_CHECKING and the table that `__getattr__` reads say the same."""
    tree = ast.parse(Path(str(specdec.__file__)).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        node.module: tuple(alias.name for alias in node.names)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
    }
    assert seen == specdec._HOMES


def test_no_module_takes_the_place_of_a_public_name():
    modules = {module.name for module in pkgutil.iter_modules(specdec.__path__)}
    assert not modules & set(specdec.__all__)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'speculate'"):
        specdec.speculate  # noqa: B018  # type: ignore[attr-defined]


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


def modules_after(statement: str) -> set[str]:
    """What a fresh process has imported after a statement."""
    code = f"{statement}; import sys; print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(printed.stdout.split())


def test_importing_specdec_and_its_command_line_loads_nothing_that_takes_seconds():
    loaded = modules_after("import specdec, specdec.cli")
    assert "specdec.cli.console" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "datasets", "specdec.api"}


def test_using_specdec_loads_neither_the_command_line_nor_training():
    loaded = modules_after("import specdec; specdec.generate")
    assert "specdec.api" in loaded
    assert not [name for name in loaded if name.startswith(("specdec.cli", "specdec.train"))]
