"""Distances between a target law p and a draft law q, as training losses.

All take the two laws over the same vocabulary and return one number for each position; reduction is the caller's
business. p never gets a gradient. alpha = sum_v min(p_v, q_v) = 1 - TV(p, q) is the probability that speculative
sampling accepts a token drawn from q (Leviathan et al., arXiv 2211.17192, theorem 3.5), so TV is the quantity
that decoding pays for; the others differ in where their gradients are large.

A loss costs passes over memory as wide as the vocabulary. So the laws are normalised once, in `Laws`, for the distance
and for all that is reported beside it.

Dimensions: M positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor

from specdec.errors import BadRecipe

SMALLEST_ALPHA = 1e-5
"""-log alpha is cut off here: two laws that share nothing give 11.5, not infinity."""


class Laws:
    """The target's law p and the draft's law q at the same positions, in fp32 at least: bf16 loses the tail of a law.

    Args:
        draft: logits [M, V].
        target: logits [M, V]; no gradient reaches them.
    """

    def __init__(self, draft: Tensor, target: Tensor) -> None:
        self.log_p = _wide(target.detach()).log_softmax(-1)
        self.log_q = _wide(draft).log_softmax(-1)

    @cached_property
    def p(self) -> Tensor:
        """[M, V]."""
        return self.log_p.exp()

    @cached_property
    def q(self) -> Tensor:
        """[M, V]."""
        return self.log_q.exp()

    @torch.no_grad()
    def agree(self) -> Tensor:
        """[M] bool: both have the same most probable token."""
        return self.log_q.argmax(-1) == self.log_p.argmax(-1)


Divergence = Callable[[Laws], Tensor]
"""[M], one number for each position."""


def forward_kl(laws: Laws) -> Tensor:
    """KL(p || q) = sum p log(p / q): covers all that the target may say. Gradient q - p in the draft's logits."""
    return (laws.p * _difference(laws.log_p, laws.log_q)).sum(-1)


def reverse_kl(laws: Laws) -> Tensor:
    """KL(q || p) = sum q log(q / p): seeks the target's mode."""
    return (laws.q * _difference(laws.log_q, laws.log_p)).sum(-1)


def jensen_shannon(laws: Laws, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (Agarwal et al., arXiv 2306.13649).

    Symmetric at beta = 0.5, bounded by log 2 there. Divided by beta it tends to the forward KL as beta tends to 0,
    divided by 1 - beta to the reverse KL as beta tends to 1.
    """
    log_p, log_q = laws.log_p, laws.log_q
    log_beta = torch.tensor(beta, dtype=log_p.dtype, device=log_p.device).log()
    log_rest = torch.tensor(1 - beta, dtype=log_p.dtype, device=log_p.device).log()
    log_m = torch.logaddexp(log_p + log_beta, log_q + log_rest)
    to_target = (laws.p * _difference(log_p, log_m)).sum(-1)
    to_draft = (laws.q * _difference(log_q, log_m)).sum(-1)
    return beta * to_target + (1 - beta) * to_draft


def total_variation(laws: Laws) -> Tensor:
    """TV = 1/2 sum |p - q| = 1 - alpha (DistillSpec, arXiv 2310.08461). Weak gradients while p and q hardly meet."""
    return 0.5 * (laws.p - laws.q).abs().sum(-1)


def negative_log_alpha(laws: Laws) -> Tensor:
    """-log sum min(p, q): TV's gradient over alpha, so that it also moves a draft that starts from nothing."""
    return -acceptance(laws).clamp(min=SMALLEST_ALPHA).log()


def adaptive(laws: Laws, decay: float = 3.0) -> Tensor:
    """lambda KL(p || q) + (1 - lambda) TV with lambda = exp(-decay alpha), detached (arXiv 2602.23881).

    Forward KL while a position is far off, TV where it is nearly right. lambda belongs to each position.
    """
    weight = torch.exp(-decay * acceptance(laws)).detach()
    return weight * forward_kl(laws) + (1 - weight) * total_variation(laws)


def cross_entropy(laws: Laws) -> Tensor:
    """-log q(argmax p): the target's greedy token as a hard label."""
    return -laws.log_q.gather(-1, laws.log_p.argmax(-1, keepdim=True))[:, 0]


def acceptance(laws: Laws) -> Tensor:
    """alpha = sum min(p, q) [M]."""
    return torch.minimum(laws.p, laws.q).sum(-1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward-kl": forward_kl,
    "reverse-kl": reverse_kl,
    "jsd": jensen_shannon,
    "tv": total_variation,
    "nla": negative_log_alpha,
    "adaptive": adaptive,
    "ce": cross_entropy,
}
PARAMETERS = {"jsd": ("beta", 0.5), "adaptive": ("decay", 3.0)}
"""The one number that some of them take, and its default."""


def divergence(spec: str) -> Divergence:
    """A divergence by name, with its number after a colon where it has one: "forward-kl", "jsd:0.3", "adaptive:1".

    Raises:
        BadRecipe: no such name, or a number that does not belong.
    """
    name, colon, number = spec.partition(":")
    if name not in DIVERGENCES:
        raise BadRecipe(f"no divergence {spec!r}; there are {', '.join(DIVERGENCES)}")
    if name not in PARAMETERS:
        if colon:
            raise BadRecipe(f"divergence {name!r} takes no number, got {spec!r}")
        return DIVERGENCES[name]
    option, default = PARAMETERS[name]
    try:
        value = float(number) if colon else default
    except ValueError:
        raise BadRecipe(f"divergence {spec!r}: {number!r} is not a number ({option})") from None
    if name == "jsd" and not 0 < value < 1:
        raise BadRecipe(f"jsd's beta lies between 0 and 1, got {value}; the ends are forward-kl and reverse-kl")
    if value < 0:
        raise BadRecipe(f"divergence {spec!r}: {option} is not negative")
    return partial(DIVERGENCES[name], **{option: value})


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(torch.float32, logits.dtype))


def _difference(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log a - log b, and 0 where a is 0: such a token adds nothing to a sum weighted by a."""
    return torch.where(log_a == -torch.inf, torch.zeros_like(log_a), log_a - log_b)
