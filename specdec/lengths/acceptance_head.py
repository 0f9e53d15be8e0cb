"""A small network that predicts acceptance, and the policy that stops by it (SpecDec++, arXiv 2405.19715).

Drafting stops where the chance that some token of the path is rejected is too large,

    1 - a_1 * a_2 * ... * a_i > stop_above,    a_i = head(features of token i)

The token that brought it there stays in the tree. The paper's head reads the draft model's last hidden state; this one
reads what every drafter can say of a token: its draft probability and that of its path, entropy and two largest
probabilities of the law it comes from, and its depth. So it serves any model-like drafter, and costs next to nothing.

Training is offline and has the paper's form: the drafter's own tokens on texts that the target writes, soft labels
min(1, p/q) (p where children are chosen), and cross-entropy in which a rejection weighs 6 times as much.

Dimensions: M recorded tokens, B rows, F nodes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from specdec.errors import UnknownDrafter
from specdec.grow.stopping import Level
from specdec.lengths.policy import LengthPolicy, Step

FORMAT = "specdec-acceptance-head-1"
FILE = "acceptance_head.safetensors"
"""Its name in a drafter directory."""

FEATURES = ("log share", "log path", "entropy", "first", "second", "log depth")
REJECTION_WEIGHT = 6.0


def features(level: Level) -> Tensor:
    """[B, F, 6] in float32; those of padding are arbitrary but finite."""
    depth = level.depths.clamp(min=1).float().log()
    parts = [level.shares.clamp(min=1e-9).log(), level.paths.clamp(min=1e-9).log(), *level.above.unbind(-1), depth]
    return torch.stack([part.float() for part in parts], -1).nan_to_num()


class AcceptanceHead(nn.Module):
    """Features [..., 6] to the logit of acceptance [...].

    Args:
        width: of its two hidden layers.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(len(FEATURES)))
        self.register_buffer("scale", torch.ones(len(FEATURES)))
        self.layers = nn.Sequential(
            nn.Linear(len(FEATURES), width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Standardised first."""
        return self.layers((inputs - self.mean) / self.scale).squeeze(-1)

    def save(self, path: Path) -> None:
        """Write it as one safetensors file; FILE in the drafter's directory is where `length=acceptance` looks."""
        described = {"format": FORMAT, "features": json.dumps(FEATURES)}
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, path, described)

    @staticmethod
    def load(path: Path) -> AcceptanceHead:
        """Read what `save` wrote.

        Raises:
            UnknownDrafter: no such file, or not such a file.
        """
        try:
            with safe_open(path, "pt") as file:
                described = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if described.get("format") != FORMAT or json.loads(described["features"]) != list(FEATURES):
                raise ValueError("another format")
            with torch.device("meta"):  # initial weights would take numbers from the text's generator
                head = AcceptanceHead(tensors["layers.0.weight"].shape[0])
            head.load_state_dict(tensors, assign=True)
        except (OSError, SafetensorError, ValueError, KeyError, IndexError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UnknownDrafter(f"{path} does not hold an acceptance head ({FORMAT}): {reason}") from error
        return head.eval().requires_grad_(False)


class AcceptanceLength(LengthPolicy):
    """Stop after the token that makes a rejection too likely.

    Args:
        weights: a file that `AcceptanceHead.save` wrote, or the head itself. A drafter's name may leave it out: then it
            is the one in the drafter's directory.
        stop_above: largest chance of a rejection along the path with which it goes on; the paper's h.
        at_least: levels that are drafted whatever the head says.

    Raises:
        UnknownDrafter: no head, or an option out of range.
    """

    stops = True

    def __init__(
        self, *, weights: str | AcceptanceHead | None = None, stop_above: float = 0.3, at_least: int = 1
    ) -> None:
        super().__init__(at_least=at_least)
        if not 0 <= stop_above <= 1 or at_least < 0:
            raise UnknownDrafter(
                f"length=acceptance takes stop_above from 0 to 1 and at_least >= 0, got {stop_above} and {at_least}"
            )
        if weights is None:
            raise UnknownDrafter(f"length=acceptance needs weights=FILE, or {FILE} in the drafter's directory")
        self.head = AcceptanceHead.load(Path(weights).expanduser()) if isinstance(weights, str) else weights
        self.stop_above = stop_above
        self._reach = torch.ones(1, 1)  # of the nodes of the last level

    @torch.inference_mode()
    def before(self, level: Level) -> Tensor:
        """By the tokens that are in the tree, and the laws they come from."""
        accepted = self.head(features(level)).sigmoid()
        above = torch.ones_like(accepted) if level.depth == 1 else self._reach.gather(1, level.parents)
        self._reach = accepted * above
        return 1 - self._reach <= self.stop_above


class AcceptanceRecorder(LengthPolicy):
    """Drafts everything, and records features and labels of every token: what `fit_acceptance_head` learns from."""

    stops = watches_tokens = wants_labels = True

    def __init__(self) -> None:
        super().__init__(carry_over=True)
        self._features: list[Tensor] = []
        self._labels: list[Tensor] = []

    def observe(self, step: Step) -> None:
        """Tokens after a rejection count, too: their labels are given their own prefix, right or wrong."""
        if step.tokens is None or step.labels is None:
            return
        live = step.tokens.live & torch.tensor([row is not None for row in step.rows])[:, None]
        self._features.append(features(step.tokens)[live])
        self._labels.append(step.labels[live].float())

    @property
    def records(self) -> tuple[Tensor, Tensor]:
        """Features [M, 6] and labels [M]."""
        if not self._features:
            return torch.zeros(0, len(FEATURES)), torch.zeros(0)
        return torch.cat(self._features), torch.cat(self._labels)


def fit_acceptance_head(
    inputs: Tensor,
    labels: Tensor,
    *,
    width: int = 32,
    steps: int = 400,
    learning_rate: float = 1e-2,
    rejection_weight: float = REJECTION_WEIGHT,
    seed: int = 0,
) -> AcceptanceHead:
    """Train a head on recorded tokens; the same records and seed give the same head.

    Args:
        inputs: features [M, 6].
        labels: probabilities of acceptance [M].
        width: of the hidden layers.
        steps: of Adam, on random batches of 4096 tokens.
        learning_rate: at first; it falls to 0 along a cosine.
        rejection_weight: of the rejected part of a label in the cross-entropy. More than 1 makes predictions cautious:
            they are no longer probabilities, which the threshold makes up for.
        seed: of weights and batches; no global generator is touched.

    Raises:
        UnknownDrafter: nothing was recorded.
    """
    if not len(labels):
        raise UnknownDrafter("no tokens were recorded; generate with length=AcceptanceRecorder() first")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = AcceptanceHead(width)
        head.mean.copy_(inputs.mean(0))
        head.scale.copy_(inputs.std(0, correction=0).clamp(min=1e-3))
        optimizer = torch.optim.Adam(head.parameters(), learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            batch = torch.randint(len(labels), (min(len(labels), 4096),))
            logits, label = head(inputs[batch]), labels[batch]
            accepted, rejected = nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)
            loss = -(label * accepted + rejection_weight * (1 - label) * rejected).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head.eval().requires_grad_(False)
