"""Every kind of draft head: the word for it, its configuration and its module.

What drafts with a kind is in `specdec.drafters.load.HEAD_DRAFTERS`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from specdec.heads.dflash import DFlashConfig, DFlashHead
from specdec.heads.kangaroo import KangarooConfig, KangarooHead
from specdec.heads.medusa import MedusaConfig, MedusaHead


class HeadKind(NamedTuple):
    """The classes of one kind; `head(config)` makes the module, also on the meta device."""

    config: type[Any]
    head: type[nn.Module]


HEADS: dict[str, HeadKind] = {
    "medusa": HeadKind(MedusaConfig, MedusaHead),
    "dflash": HeadKind(DFlashConfig, DFlashHead),
    "kangaroo": HeadKind(KangarooConfig, KangarooHead),
}
