"""Lossless speculative decoding for transformers models.

import specdec
output = specdec.generate(model, **inputs, drafter="suffix", max_new_tokens=128)
"""

from specdec.api import SpeculativeOutput, attach, detach, generate, target_of
from specdec.drafter import Committed, Drafter
from specdec.drafters.load import load_drafter
from specdec.errors import DrafterMismatch, SpecdecError, UnknownDrafter, UnsupportedGeneration, UnsupportedModel
from specdec.optimize import deoptimize, optimize
from specdec.stats import DecodeStats
from specdec.tree import TokenTree
from specdec.version import __version__

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
