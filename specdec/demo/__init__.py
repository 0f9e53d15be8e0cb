"""What ships with specdec: a small target, a draft model and draft heads for it, and prompts from held-out code."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
HEADS = {f"demo-{kind}": FOLDER / "heads" / kind for kind in ("medusa", "hydra", "eagle", "eagle3", "kangaroo")}
"""Names of the draft heads that ship, and their directories."""


def target_path() -> Path:
    """Directory of the demo target."""
    return FOLDER / "target"


def draft_path() -> Path:
    """Directory of the demo draft model."""
    return FOLDER / "draft"


def prompts() -> dict[str, str]:
    """Name and text of the prompts that ship with the pair, without the newline that ends each file.

    A prompt that ends in the middle of a line leaves the line break, and the indent that belongs to it, to the model.
    """
    return {path.stem: path.read_text().removesuffix("\n") for path in sorted((FOLDER / "prompts").glob("*.py"))}
