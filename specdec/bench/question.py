"""One benchmark question, and the report column that its category belongs to."""

from __future__ import annotations

from dataclasses import dataclass

MULTI_TURN = "Multi-turn Conversation"
MT_BENCH_CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
SPEC_BENCH_COLUMNS: dict[str, str] = {
    **dict.fromkeys(MT_BENCH_CATEGORIES, MULTI_TURN),
    "translation": "Translation",
    "summarization": "Summarization",
    "qa": "Question Answering",
    "math_reasoning": "Mathematical Reasoning",
    "rag": "Retrieval-aug. Generation",
}
"""Spec-Bench's 13 raw categories and its leaderboard's 6 columns, in the leaderboard's order."""


@dataclass(frozen=True)
class Question:
    """What a user asks, one text for each turn.

    Attributes:
        id: unique within its file, and unique as text too: 7 and "7" do not occur together.
        category: raw, as the file has it.
        turns: the user's messages in order; at least one, none of them blank.
        references: answers that the file calls right, in its order; never shown to the model.
        line: of the file, from 1; for Parquet the row.
        own_column: the file's categories are not Spec-Bench's, even where they share a name.
    """

    id: int | str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()
    line: int = 0
    own_column: bool = False

    @property
    def column(self) -> str:
        """The row of a report that this question counts in: one of Spec-Bench's six, else its own category."""
        return self.category if self.own_column else SPEC_BENCH_COLUMNS.get(self.category, self.category)
