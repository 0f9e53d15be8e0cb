"""Every kind of draft head: the word for it, its configuration and its module.

What drafts with a kind is in `specdec.drafters.load.HEAD_DRAFTERS`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from specdec.heads.clover import CloverConfig, CloverHead
from specdec.heads.dflash import DFlashConfig, DFlashHead
from specdec.heads.eagle import EagleConfig, EagleHead
from specdec.heads.eagle3 import Eagle3Config, Eagle3Head
from specdec.heads.hydra import HydraConfig, HydraHead
from specdec.heads.kangaroo import KangarooConfig, KangarooHead
from specdec.heads.medusa import MedusaConfig, MedusaHead
from specdec.heads.mlp_speculator import MLPSpeculatorConfig, MLPSpeculatorHead


class HeadKind(NamedTuple):
    """The classes of one kind; `head(config)` makes the module, also on the meta device."""

    config: type[Any]
    head: type[nn.Module]


HEADS: dict[str, HeadKind] = {
    "medusa": HeadKind(MedusaConfig, MedusaHead),
    "hydra": HeadKind(HydraConfig, HydraHead),
    "clover": HeadKind(CloverConfig, CloverHead),
    "mlp-speculator": HeadKind(MLPSpeculatorConfig, MLPSpeculatorHead),
    "dflash": HeadKind(DFlashConfig, DFlashHead),
    "eagle": HeadKind(EagleConfig, EagleHead),
    "eagle3": HeadKind(Eagle3Config, Eagle3Head),
    "kangaroo": HeadKind(KangarooConfig, KangarooHead),
}
