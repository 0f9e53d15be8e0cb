"""A finished drafter on the hub, when somebody asks for it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from specdec.errors import BadRecipe, SpecdecError


def check_push(name: str) -> None:
    """Refuse before the training what could not be pushed after it.

    Raises:
        BadRecipe: no OWNER/NAME, or nobody is logged in.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise BadRecipe(f"{name!r} is no name on the hub: {' '.join(str(error).split())}") from error
    if "/" not in name:
        raise BadRecipe(f"a repository of the hub is called OWNER/NAME, got {name!r}")
    if get_token() is None:
        raise BadRecipe("pushing to the hub needs a token: `hf auth login`, or set HF_TOKEN")


def push_to_hub(drafter: Path, name: str, *, private: bool = True) -> str:
    """Upload a drafter directory as a model repository; it is made when it does not exist.

    Args:
        drafter: the directory.
        name: OWNER/NAME.
        private: of a repository that is made.

    Returns:
        its address.

    Raises:
        SpecdecError: anything that the hub or the network objects to.
    """
    try:
        api = HfApi()
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=drafter.resolve(), commit_message="Drafter")
    except Exception as error:  # the network's and the hub's errors have no common class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SpecdecError(f"{drafter} is finished but could not be pushed to {name}: {reason}") from error
    return str(repository)
