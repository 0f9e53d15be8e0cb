"""The prompts that a drafter is tuned on: the first turns of benchmark questions."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.bench.prompts import PromptBuilder
from specdec.bench.questions import QuestionSet
from specdec.errors import SpecdecError
from specdec.probe import target_of


def first_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: QuestionSet,
    count: int,
    max_new_tokens: int,
    template: str = "auto",
) -> tuple[tuple[int, ...], ...]:
    """Ids of so many questions, spread over the set's columns; those without room for the new tokens are left out.

    Raises:
        SpecdecError: none is left.
    """
    builder, limit = PromptBuilder(tokenizer, template), target_of(model).max_positions
    per_column = -(-count // len(questions.columns))
    few = questions.limited(per_column).questions
    prompts = [tuple(builder.build([{"role": "user", "content": q.turns[0]}]).input_ids) for q in few]
    fitting = [ids for ids in prompts if limit is None or len(ids) + max_new_tokens <= limit]
    if not fitting:
        raise SpecdecError(
            f"no question of {questions.name} leaves room for {max_new_tokens} new tokens in a model of {limit} "
            "positions; lower --max-new-tokens or give other --questions"
        )
    return tuple(fitting[:count])
