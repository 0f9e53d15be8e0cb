"""A finished drafter on the hub, when somebody asks for it."""

from __future__ import annotations

from pathlib import Path

from specdec.errors import SpecdecError


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
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=drafter.resolve(), commit_message="Drafter")
    except Exception as error:  # the network's and the hub's errors have no common class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SpecdecError(f"{drafter} is finished but could not be pushed to {name}: {reason}") from error
    return str(repository)
