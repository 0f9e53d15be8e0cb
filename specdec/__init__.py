"""Lossless speculative decoding for transformers models.

import specdec
output = specdec.generate(model, **inputs, drafter="suffix", max_new_tokens=128)

Names are imported when they are first used: torch and transformers take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from specdec.version import __version__

if TYPE_CHECKING:
    from specdec.api import SpeculativeOutput, attach, detach, generate, target_of
    from specdec.drafter import Committed, Drafter
    from specdec.drafters.load import load_drafter
    from specdec.errors import DrafterMismatch, SpecdecError, UnknownDrafter, UnsupportedGeneration, UnsupportedModel
    from specdec.packed import deoptimize, optimize
    from specdec.stats import DecodeStats
    from specdec.tree import TokenTree

__all__ = [
    "Committed",
    "DecodeStats",
    "Drafter",
    "DrafterMismatch",
    "SpecdecError",
    "SpeculativeOutput",
    "TokenTree",
    "UnknownDrafter",
    "UnsupportedGeneration",
    "UnsupportedModel",
    "__version__",
    "attach",
    "deoptimize",
    "detach",
    "generate",
    "load_drafter",
    "optimize",
    "target_of",
]

# No module of this package may have the name of something here: importing it would put the module in its place.
_HOMES = {
    "specdec.api": ("SpeculativeOutput", "attach", "detach", "generate", "target_of"),
    "specdec.drafter": ("Committed", "Drafter"),
    "specdec.drafters.load": ("load_drafter",),
    "specdec.errors": (
        "DrafterMismatch",
        "SpecdecError",
        "UnknownDrafter",
        "UnsupportedGeneration",
        "UnsupportedModel",
    ),
    "specdec.packed": ("deoptimize", "optimize"),
    "specdec.stats": ("DecodeStats",),
    "specdec.tree": ("TokenTree",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name that has not been used yet (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
