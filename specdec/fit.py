"""Whether a draft head fits a target: sizes, vocabulary and the hidden states that it reads."""

from __future__ import annotations

from specdec.errors import DrafterMismatch
from specdec.target import BEFORE_NORM, Target


def require_fit(
    head: str,
    target: Target,
    *,
    hidden_size: int | None = None,
    vocab_size: int | None = None,
    num_layers: int | None = None,
    taps: tuple[int, ...] = (),
) -> None:
    """Refuse a head that was made for another target.

    Args:
        head: what to call it in the message.
        target: the model that it shall draft for.
        hidden_size: D that the head was made for; None when it does not matter.
        vocab_size: V likewise.
        num_layers: L likewise.
        taps: hidden states that it reads.

    Raises:
        DrafterMismatch: names everything that differs.
    """
    wanted = {"hidden size": (hidden_size, target.hidden_size), "vocabulary": (vocab_size, target.vocab_size),
              "layers": (num_layers, target.num_layers)}  # fmt: skip
    wrong = [f"{name} {made_for}, the target has {has}" for name, (made_for, has) in wanted.items()
             if made_for not in (None, has)]  # fmt: skip
    absent = [tap for tap in taps if tap != BEFORE_NORM and not 0 <= tap <= target.num_layers]
    if absent:
        states = ", ".join(map(str, absent))
        wrong.append(f"hidden states {states}, the target has 0 to {target.num_layers}")
    if wrong:
        raise DrafterMismatch(f"{head} was made for another target: {'; '.join(wrong)}; use it with its own target")
