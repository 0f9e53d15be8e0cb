"""What can go wrong and whose move it is.

    SpecdecError (ValueError)
    ├── UnsupportedModel       the target cannot be verified as asked; use another class of model
    ├── UnsupportedGeneration  a generate() option that speculation cannot honour exactly
    ├── UnknownDrafter         no drafter of that name, no such path, or a malformed option
    ├── DrafterMismatch        drafter and target do not belong together
    ├── BadRecipe              a training setting that does not exist or does not fit the others
    ├── BadData                training text that cannot be read, or that supervises nothing
    ├── BadQuestions           benchmark questions that cannot be found, fetched, read or selected
    └── BadCheckpoint          files that are not what they claim, or belong to another run

Every message says what was wrong, what was got, what was expected and what to do.
"""

from __future__ import annotations


class SpecdecError(ValueError):
    """Base of every error that a user of specdec can cause."""


class UnsupportedModel(SpecdecError):
    """The target cannot be verified: encoder-decoder, recurrent state, or failed the probe."""


class UnsupportedGeneration(SpecdecError):
    """A generation option that has no lossless speculative counterpart here, such as beam search."""


class UnknownDrafter(SpecdecError):
    """A drafter specification that names nothing we know, or carries a wrong option."""


class DrafterMismatch(SpecdecError):
    """A drafter that was made for another target: vocabulary, hidden size or layers differ."""


class BadRecipe(SpecdecError):
    """A training setting that does not exist, or that contradicts another."""


class BadData(SpecdecError):
    """Training text that cannot be read, or that would supervise nothing."""


class BadCheckpoint(SpecdecError):
    """Files that are truncated, of another kind, or of another run than they should be."""


class BadQuestions(SpecdecError):
    """Benchmark questions that cannot be found, fetched, read or selected; names file and line where there are any."""
