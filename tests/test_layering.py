"""Imports point down: the table says who may import whom, and the sources are read to hold them to it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"specdec": "specdec", "heads": "specdec.heads", "train": "specdec.train"}
LINKS = {ROOT / "specdec" / "heads", ROOT / "specdec" / "train"}
OURS = {*FOLDERS, "scripts", "tests", ""}  # "" is what a relative import begins with

TREES = {"specdec.tree", "specdec.sampling", "specdec.draws", "specdec.vocabulary", "specdec.errors"}
MODELS = {
    "specdec.packed",
    "specdec.additive_mask",
    "specdec.block_mask",
    "specdec.visibility",
    "specdec.probe",
    "specdec.context",
    "specdec.cache",
    "specdec.target",
    "specdec.version",
    "specdec.fit",
    *TREES,
}
DRAFTING = {"specdec.drafter", "specdec.costs.table", "specdec.grow", "specdec.lengths", *MODELS}
DRAFTING |= {"specdec.bottom", "specdec.pending"}
STEPS = {"specdec.drafter", "specdec.emitter", "specdec.acceptance", "specdec.verifier", "specdec.stats", *MODELS}
LIBRARY = {"specdec.api", "specdec.decode", "specdec.drafters", "specdec.heads", "specdec.formats", "specdec.demo"}
LIBRARY |= {"specdec.environment", "specdec.json_lines", *STEPS, *DRAFTING}

# The longest matching prefix of a module's name wins ("specdec" stands for specdec/__init__.py alone); the value is
# what it may import from this project, submodules included. Lower rows know nothing of higher ones.
MAY_IMPORT: dict[str, set[str]] = {
    "specdec.__main__": {"specdec.cli", "specdec.interrupt"},
    "specdec.cli": {
        "specdec",
        "specdec.bench",
        "specdec.tuning",
        "specdec.costs",
        "specdec.train",
        "specdec.interrupt",
        *LIBRARY,
    },
    "specdec.bench": LIBRARY,
    "specdec.tuning": {"specdec.bench", "specdec.costs", *LIBRARY},
    "specdec.costs": LIBRARY,
    "specdec.costs.table": {"specdec.costs.interpolation", "specdec.errors"},
    "specdec.costs.interpolation": set(),
    "specdec": {
        "specdec.api",
        "specdec.packed",
        "specdec.drafters.load",
        "specdec.drafter",
        "specdec.stats",
        "specdec.version",
        *TREES,
    },
    "specdec.train": LIBRARY,
    "specdec.api": {"specdec.decode", "specdec.drafters.load", *STEPS},
    "specdec.decode": STEPS,
    "specdec.drafters.load": {"specdec.drafters", "specdec.formats", "specdec.demo", *DRAFTING},
    "specdec.drafters.head": {"specdec.formats", "specdec.heads", "specdec.drafters.directory", "specdec.errors"},
    "specdec.formats": {"specdec.heads", "specdec.drafters.directory", "specdec.errors"},
    "specdec.drafters.directory": {"specdec.errors"},
    "specdec.drafters": {"specdec.heads", "specdec.lean", *DRAFTING},
    "specdec.lean": {"specdec.context", "specdec.target", "specdec.joined", "specdec.heads"},
    "specdec.joined": set(),
    "specdec.heads": {"specdec.joined", *DRAFTING},
    "specdec.acceptance": {"specdec.drawn_rules", "specdec.emitter", "specdec.law", *TREES},
    "specdec.drawn_rules": {"specdec.failures", "specdec.law", *TREES},
    "specdec.failures": {"specdec.law", "specdec.tree"},
    "specdec.emitter": {"specdec.sampling", "specdec.errors"},
    "specdec.law": {"specdec.emitter", "specdec.tree"},
    "specdec.verifier": {"specdec.column_order", *MODELS},
    "specdec.column_order": {"specdec.target", "specdec.tree"},
    "specdec.bottom": {"specdec.grow", *MODELS},
    "specdec.pending": {"specdec.drafter", "specdec.context"},
    "specdec.drafter": {"specdec.context", *TREES},
    "specdec.lengths": {"specdec.costs.table", "specdec.costs.interpolation", "specdec.grow", *TREES},
    "specdec.grow": {"specdec.costs.table", *TREES},
    "specdec.fit": {"specdec.target", "specdec.errors"},
    "specdec.probe": {"specdec.context", "specdec.target", "specdec.tree", "specdec.errors", "specdec.version"},
    "specdec.context": {
        "specdec.cache",
        "specdec.target",
        "specdec.additive_mask",
        "specdec.block_mask",
        "specdec.visibility",
    },
    "specdec.additive_mask": {"specdec.visibility", "specdec.tree"},
    "specdec.block_mask": {"specdec.visibility", "specdec.tree"},
    "specdec.visibility": {"specdec.tree"},
    "specdec.target": {"specdec.errors"},
    "specdec.sampling": {"specdec.draws", "specdec.errors"},
    "specdec.draws": set(),
    "specdec.vocabulary": {"specdec.errors"},
    "specdec.json_lines": {"specdec.errors"},
    "specdec.packed": set(),
    "specdec.cache": set(),
    "specdec.tree": set(),
    "specdec.stats": set(),
    "specdec.demo": set(),
    "specdec.environment": {"specdec.version"},
    "specdec.errors": set(),
    "specdec.interrupt": set(),
    "specdec.version": set(),
}

SELF_CONTAINED = {
    "specdec.cli",
    "specdec.formats",
    "specdec.bench",
    "specdec.costs",
    "specdec.tuning",
    "specdec.train",
    "specdec.heads",
    "specdec.grow",
    "specdec.lengths",
    "specdec.demo",
}
"""Packages whose modules may import each other. Not specdec.drafters: one drafter does not build on another."""

ABOVE_THE_CORE = ("specdec.__main__", "specdec.cli", "specdec.bench", "specdec.train", "specdec.tuning")


def python_files(folder: str) -> Iterator[Path]:
    """Every source of a folder, once: links lead to folders that are visited anyway, prompts are data."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        if not LINKS.intersection(path.parents) and "prompts" not in path.parts:
            yield path


def modules() -> dict[str, Path]:
    """Dotted name and file of every module of the package."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in python_files(folder):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imports_of(source: str, known: set[str]) -> set[str]:
    """Modules of this project that a source names, in functions and under TYPE_CHECKING too.

    `from package import name` counts as the module `package.name` where there is one. Relative imports keep
    their dots, so that no row of the table allows them.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            parts = {f"{module}.{alias.name}" for alias in node.names}
            names |= {part if part in known else module for part in parts}
    return {name for name in names if name.split(".")[0] in OURS}


def is_within(module: str, entry: str) -> bool:
    """Whether a name of the table covers a module."""
    return module == entry or (entry != "specdec" and module.startswith(f"{entry}."))


def row_of(module: str) -> str:
    """The row of the table that decides about a module."""
    rows = [row for row in MAY_IMPORT if is_within(module, row)]
    assert rows, f"{module} has no row in MAY_IMPORT: decide which layer it belongs to"
    return max(rows, key=len)


def violations(module: str, source: str, known: set[str]) -> list[str]:
    """One line for every import that the table does not allow."""
    row = row_of(module)
    allowed = {*MAY_IMPORT[row], *SELF_CONTAINED.intersection({row})}
    names = sorted(imports_of(source, known))
    return [f"{module} imports {name}" for name in names if not any(is_within(name, entry) for entry in allowed)]


def test_imports_point_down():
    sources = {module: path.read_text() for module, path in modules().items()}
    found = [line for module, source in sources.items() for line in violations(module, source, set(sources))]
    assert not found, "\n".join(["imports that tests/test_layering.py does not allow:", *found])


def test_no_module_imports_itself_through_others():
    sources = {module: path.read_text() for module, path in modules().items()}
    graph = {module: imports_of(source, set(sources)) - {module} for module, source in sources.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the cycle
    assert order.index("specdec.tree") < order.index("specdec.api")


def test_the_table_itself_has_no_cycle_and_no_row_without_a_module():
    known = set(modules())
    assert {row_of(module) for module in known} == set(MAY_IMPORT)
    graph = {row: {row_of(name) for name in MAY_IMPORT[row]} - {row} for row in MAY_IMPORT}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MAY_IMPORT)


def test_nothing_in_the_core_imports_training_or_the_command_line():
    known = modules()
    for module, path in known.items():
        if module.startswith(ABOVE_THE_CORE):
            continue
        crooked = [name for name in imports_of(path.read_text(), set(known)) if name.startswith(ABOVE_THE_CORE)]
        assert not crooked, f"{module} imports {crooked}"


@pytest.mark.parametrize("folder", [*FOLDERS, "scripts", "tests"])
def test_code_says_specdec_heads_and_never_heads(folder: str):
    for path in python_files(folder):
        names = {name.split(".")[0] for name in imports_of(path.read_text(), set())}
        assert not names & {"heads", "train"}, f"{path} imports {names}: say specdec.heads, specdec.train"


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        ("specdec.tree", "from specdec.target import Target", "specdec.target"),
        ("specdec.tree", "import specdec.target", "specdec.target"),
        ("specdec.target", "from specdec import api", "specdec.api"),
        ("specdec.grow.shape", "def late():\n    import specdec.drafters.lookup", "specdec.drafters.lookup"),
        ("specdec.cache", "from .context import Context", ".context"),
        ("specdec.cache", "if TYPE_CHECKING:\n    from specdec.context import Context", "specdec.context"),
        ("specdec.drafters.lookup", "from specdec.drafters.suffix import SuffixDrafter", "specdec.drafters.suffix"),
        ("specdec.drafters.lookup", "import specdec", "specdec"),
        ("specdec.decode", "import specdec.train", "specdec.train"),
        ("specdec.heads.medusa", "import heads", "heads"),
    ],
)  # fmt: skip
def test_the_check_catches_an_import_that_points_up(module: str, source: str, caught: str):
    assert violations(module, source, set(modules())) == [f"{module} imports {caught}"]


def test_the_check_lets_an_import_that_points_down_pass():
    source = "import torch\nfrom specdec.tree import TokenTree\nfrom specdec.grow.shape import chain"
    assert violations("specdec.drafters.lookup", source, set(modules())) == []


def test_a_module_without_a_layer_is_refused():
    with pytest.raises(AssertionError, match="decide which layer"):
        row_of("specdec.utilities")
