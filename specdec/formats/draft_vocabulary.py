"""Reduced vocabularies: `d2t`, from guessed to target tokens, and `t2d`, which target tokens are guessed.

By definition d2t holds offsets: guess i is token i + d2t[i]. Some exporters store the tokens themselves; servers would
emit wrong tokens without a word. What a file holds is told from t2d where it is there; without it, numbers that cannot
be offsets (beyond the vocabulary, or naming a token twice) but do name different tokens are tokens.

Dimensions: N guesses, V target tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.formats.folder import Folder


def take_vocabulary(folder: Folder, vocab_size: int, count: int) -> dict[str, Tensor]:
    """`d2t` as offsets, int64 [N], and `t2d`, bool [V], checked against each other; problems go to the folder.

    Args:
        folder: where the tensors lie; t2d may be missing.
        vocab_size: V.
        count: N.
    """
    given = folder.take("d2t", (count,), "int")
    marks = folder.take("t2d", (vocab_size,), None) if folder.has("t2d") else None
    if given.is_meta or (marks is not None and marks.is_meta):  # missing or wrong-shaped, which is noted
        return {"d2t": given.new_empty(count), "t2d": torch.empty(vocab_size, dtype=torch.bool, device="meta")}
    given, places = given.long().cpu(), torch.arange(count)
    for ids in (given + places, given):
        if not _names(ids, vocab_size):
            continue
        t2d = torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, ids, True)
        if marks is None or torch.equal(marks.cpu().bool(), t2d):
            return {"d2t": ids - places, "t2d": t2d}
    if _names(given + places, vocab_size) or _names(given, vocab_size):
        folder.problem("t2d does not mark the tokens that d2t names")
    else:
        folder.problem(f"d2t does not name {count} different tokens of a vocabulary of {vocab_size}")
    return {"d2t": given, "t2d": torch.zeros(vocab_size, dtype=torch.bool)}


def _names(ids: Tensor, vocab_size: int) -> bool:
    """Whether these are different tokens."""
    return bool((ids >= 0).all()) and bool((ids < vocab_size).all()) and len(ids.unique()) == len(ids)
