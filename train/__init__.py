"""Training of drafters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.train.online import LearningDrafter, OnlineSettings

__all__ = ["LearningDrafter", "OnlineSettings"]


def __getattr__(name: str) -> Any:
    """The names above on first use: most of this package does not need what they load."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from specdec.train import online

    return getattr(online, name)
