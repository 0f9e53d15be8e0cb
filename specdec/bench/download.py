"""Files from the network: verified before they get their name, and again whenever they are read from the cache."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from specdec.errors import BadQuestions
from specdec.probe import cache_folder

TIMEOUT = 30.0
"""Seconds without a byte after which a download is given up."""

CHUNK = 1 << 16


@dataclass(frozen=True)
class Download:
    """A file that never changes.

    Attributes:
        url: names a commit, so that nobody can put another file there.
        sha256: of its bytes.
        size: in bytes.
    """

    url: str
    sha256: str
    size: int

    @property
    def path(self) -> Path:
        """Where it is cached. The checksum is part of the name, so another version never stands in for it."""
        return cache_folder() / "questions" / f"{self.sha256[:16]}-{self.url.rsplit('/', 1)[-1]}"


def downloaded(name: str, file: Download) -> Path:
    """The file on this machine: from the cache when it is there and whole, else downloaded.

    A download is written to a temporary file beside its place and renamed when size and sha256 are right and it is on
    disk. Whatever ends it before that, nothing is left.

    Args:
        name: what the user asked for, for messages.
        file: what to fetch.

    Raises:
        BadQuestions: it cannot be fetched or stored, or is not what was expected.
    """
    if _is_whole(file):
        return file.path
    advice = f"fetch it elsewhere and give its path instead of {name}, or put it at {file.path}"
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(file, advice)
    except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        raise BadQuestions(f"cannot download {name} from {file.url} ({reason}); {advice}") from error
    return file.path


def _is_whole(file: Download) -> bool:
    try:
        return hashlib.sha256(file.path.read_bytes()).hexdigest() == file.sha256
    except OSError:
        return False


def _fetch(file: Download, advice: str) -> None:
    descriptor, name = tempfile.mkstemp(prefix=".partial-", dir=file.path.parent)
    try:
        with os.fdopen(descriptor, "wb") as partial, urllib.request.urlopen(file.url, timeout=TIMEOUT) as response:
            size, sha256 = _copy(response, partial, most=file.size)
            if (size, sha256) != (file.size, file.sha256):
                got = f"more than {file.size} bytes" if size > file.size else f"{size} bytes with sha256 {sha256}"
                expected = f"{file.size} bytes with sha256 {file.sha256}"
                raise BadQuestions(f"{file.url}: got {got}; expected {expected}; nothing was kept; {advice}")
            partial.flush()
            os.fsync(partial.fileno())
        os.replace(name, file.path)
        _sync_folder(file.path.parent)
    except BaseException:  # Ctrl-C too
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _copy(source: IO[bytes], target: IO[bytes], most: int) -> tuple[int, str]:
    """Bytes copied and their sha256. Stops once there are more than `most`: that is another file already."""
    size, digest = 0, hashlib.sha256()
    while size <= most and (chunk := source.read(min(CHUNK, most + 1 - size))):
        size += len(chunk)
        digest.update(chunk)
        target.write(chunk)
    return size, digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make the new name itself last; not every system can open a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
