"""A drafter as it was when it was loaded: what it learns from one question must not help with the next one.

A copy is made through a pickle in which models are references, so that it costs as much as the drafter's own state.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

from torch import nn

from specdec.drafter import Drafter
from specdec.errors import SpecdecError
from specdec.target import Target

SHARED = (nn.Module, nn.Parameter, Target)


class FreshDrafter:
    """Hands out copies of a drafter in the state it has now; all copies share its models.

    Args:
        name: of the drafter, for messages.
        drafter: just loaded.

    Raises:
        SpecdecError: its state cannot be copied.
    """

    def __init__(self, name: str, drafter: Drafter) -> None:
        self.name = name
        self._shared: list[Any] = []
        try:
            self._state = self._pickled(drafter)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise SpecdecError(
                f"the state of drafter {name} cannot be copied ({error}), so it cannot start anew for each question; "
                "keep it from question to question with --carry-over"
            ) from error
        self._weights = self._weight_versions()

    def copy(self) -> Drafter:
        """The drafter as it was.

        Raises:
            SpecdecError: weights that the copies share have changed.
        """
        if self._weight_versions() != self._weights:
            raise SpecdecError(
                f"drafter {self.name} changed its weights while it drafted, so it cannot start anew for each question; "
                "keep them from question to question with --carry-over"
            )
        unpickler = pickle.Unpickler(io.BytesIO(self._state))
        unpickler.persistent_load = self._shared.__getitem__  # type: ignore[method-assign]
        return unpickler.load()

    def _pickled(self, drafter: Drafter) -> bytes:
        places: dict[int, int] = {}
        shared = self._shared

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj: Any) -> int | None:
                if not isinstance(obj, SHARED):
                    return None
                if id(obj) not in places:
                    places[id(obj)] = len(shared)
                    shared.append(obj)
                return places[id(obj)]

        buffer = io.BytesIO()
        Pickler(buffer).dump(drafter)
        return buffer.getvalue()

    def _weight_versions(self) -> int:
        """Grows with every change in place of a shared weight."""
        modules = [part.model if isinstance(part, Target) else part for part in self._shared]
        weights = [w for m in modules for w in (m.parameters() if isinstance(m, nn.Module) else [m])]
        return sum(weight._version for weight in weights if not weight.is_inference())
