"""A draft model learns from laws that are there already: one forward over the text, compared where there is a law."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from specdec.drafters.directory import DrafterJson, fingerprint, read_drafter_json, write_drafter_json
from specdec.packed import deoptimize
from specdec.train.batch import TrainBatch
from specdec.train.kinds.draft_model import in_common, logits_at
from specdec.train.objective import Objective, Term


class LearningModel:
    """The part of a Trainable that online learning needs, for a causal language model.

    Args:
        model: learns, in fp32; one text in a row.
        vocab_size: V of the target.
        live: the model that drafts, whose dtype is that of what is saved.
    """

    kind = "draft-model"
    taps: tuple[int, ...] = ()
    needs_logits = True

    def __init__(self, model: PreTrainedModel, vocab_size: int, live: PreTrainedModel) -> None:
        self.module: nn.Module = deoptimize(model).float()
        self.live = live
        self.vocab_size = vocab_size
        self.target: PreTrainedModel | None = None

    def terms(self, batch: TrainBatch, objective: Objective) -> list[Term]:
        """One term, over the tokens that both vocabularies have.

        Rows are padded on the right behind their only document, so that the causal mask alone keeps padding out.
        """
        last = self.live.config.get_text_config(decoder=True).vocab_size - 1
        read = replace(batch, ids=batch.ids.clamp(max=last))  # as the drafter reads ids that it lacks
        drafted = logits_at(cast(PreTrainedModel, self.module), read, batch.drafts(1))
        drafted, laws = in_common(drafted[:, : self.vocab_size], batch.laws(1))
        return [objective.term(1, drafted, laws)]

    def save(self, path: Path) -> None:
        """A drafter directory, in the dtype that drafts."""
        state = {name: value.detach().to(self.live.dtype) if value.is_floating_point() else value
                 for name, value in self.module.state_dict().items()}  # fmt: skip
        cast(PreTrainedModel, self.module).save_pretrained(path, state_dict=state)
        came_from = Path(self.live.name_or_path) if self.live.name_or_path else None
        if came_from is not None and (came_from / "tokenizer.json").is_file():
            shutil.copyfile(came_from / "tokenizer.json", path / "tokenizer.json")  # says which vocabulary this is
        if self.target is not None:
            described = came_from is not None and (came_from / "drafter.json").is_file()
            options = read_drafter_json(came_from).options if described and came_from is not None else {}
            write_drafter_json(path, DrafterJson(self.kind, options, fingerprint(self.target)))
