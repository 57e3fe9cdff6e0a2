"""Asks the Hugging Face Hub for files and their hashes, and copies their bytes. Errors are those of hub_errors.

huggingface_hub knows the Hub: addresses, the token, the meaning of answers. hf_hub_download is not used: since release
2 an interrupted download starts again from nothing (huggingface_hub 2.4.0, file_download.py,
_download_to_tmp_and_move), and one file here has 15 GB.
"""

import errno
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from kohaku_delta.errors import UserError
from kohaku_delta.hub import connection
from kohaku_delta.hub.hub_errors import (
    CORRECT_ENDPOINT,
    Cancelled,
    TransientError,
    translate_errors,
    translate_parse_errors,
)
from kohaku_delta.hub.pins import HubFile
from kohaku_delta.printing import log_above_bar

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds, doubled from try to try
TRIES = 12  # in a row without progress: six minutes of waiting
PROGRESS = 1 << 20  # bytes after which the count of tries starts again
BATCH = 500  # files per request for hashes
PATIENCE = 900  # seconds; if the Hub asks for a longer wait, the download ends
Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub says about a file: its size, and its sha256 (LFS files) or git's sha1 of it (small files)."""

    size: int
    sha256: str | None
    git: str | None
    storage: str | None = field(default=None, repr=False)  # signed address of a large file's bytes; never to be shown

    @property
    def mark(self) -> str:
        """The first digits of its hash."""
        return (self.sha256 or self.git or "")[:16]


def _url(file: HubFile) -> str:
    from huggingface_hub import constants, hf_hub_url

    return hf_hub_url(file.repo, file.file, repo_type=file.kind, revision=file.revision, endpoint=constants.ENDPOINT)


def head_file(file: HubFile) -> RemoteFile:
    """Size and hash of a file at its revision. Raises TransientError, UserError."""
    from huggingface_hub import constants, get_hf_file_metadata

    with translate_errors(file):
        answer = get_hf_file_metadata(
            _url(file), headers=connection.request_headers(), token=False, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    if answer.commit_hash is None:
        raise UserError(_describe_non_hub(answer.location))
    etag = answer.etag or ""
    if answer.size is None or answer.size < 0 or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag):
        raise UserError(
            f"{connection.endpoint()} does not give size and hash of {file.file}, as a hub does. {CORRECT_ENDPOINT}"
        )
    if file.revision is not None and answer.commit_hash != file.revision:
        raise UserError(
            f"{connection.endpoint()} answers for the revision {answer.commit_hash[:40]!a} of {file.repo} where "
            f"{file.revision} was asked for. {CORRECT_ENDPOINT}"
        )
    storage = None if answer.location.startswith(constants.ENDPOINT + "/") else answer.location
    sha256, git = (etag, None) if len(etag) == 64 else (None, etag)
    return RemoteFile(answer.size, sha256, git, storage)


def _describe_non_hub(location: str) -> str:
    """What to say of an answer without a revision, which `location` gave or redirects to."""
    from huggingface_hub import constants

    target = re.match("https?://[^/?#@]+", location)
    if target and not location.startswith(constants.ENDPOINT + "/"):
        found = f"it redirects to {target[0][:200]!a}"
        return f"{connection.endpoint()} is not a hub: {found}. Set HF_ENDPOINT to that address."
    return f"{connection.endpoint()} does not answer as a hub does (no revision). {CORRECT_ENDPOINT}"


def latest_commit(file: HubFile) -> str:
    """The commit at the end of the repository's main branch. Raises TransientError, UserError."""
    from huggingface_hub import constants

    with translate_errors(file), translate_parse_errors():
        info = connection.api().repo_info(file.repo, repo_type=file.kind, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
        raise UserError(f"{connection.endpoint()} does not give the commit of main of {file.repo}. {CORRECT_ENDPOINT}")
    return info.sha


def list_files(files: list[HubFile]) -> dict[str, RemoteFile]:
    """Size and hash of these files of one revision, by name; files that do not exist are left out. Raises
    TransientError, UserError.
    """
    from huggingface_hub import RepoFile

    found = {}
    for start in range(0, len(files), BATCH):
        names, first = [file.file for file in files[start : start + BATCH]], files[start]
        with translate_errors(first), translate_parse_errors():
            answers = connection.api().get_paths_info(first.repo, names, revision=first.revision, repo_type=first.kind)
        for answer in answers:
            if answer.path in names and isinstance(answer, RepoFile):
                sha256, git = (answer.lfs.sha256, None) if answer.lfs else (None, answer.blob_id)
                found[answer.path] = RemoteFile(answer.size, sha256, git)
    return found


def copy_range(
    file: HubFile,
    descriptor: int,
    first: int,
    last: int,
    stop: threading.Event,
    advance: Callable[[int], object] = lambda count: None,
    storage: str | None = None,
) -> None:
    """Copies bytes first … last - 1 of a file on the Hub to the same offsets of an open file.

    storage: the signed address from head_file; it is read without asking the Hub again, and without the token. Raises
    TransientError with the bytes gained, Cancelled once `stop` is set, UserError, OSError.
    """
    position = first
    try:
        with _open_range(file, first, last, storage) as (offset, pieces):
            skip = first - offset  # a server may send the whole file instead
            for piece in pieces:
                if stop.is_set():
                    raise Cancelled
                piece, skip = piece[skip:], max(0, skip - len(piece))
                if position + len(piece) > last:
                    raise TransientError("sent more than it was asked for")
                written = os.pwrite(descriptor, piece, position)
                position += written
                advance(written)
                if written < len(piece):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if position < last:
            raise TransientError("ended the file early")
    except TransientError as error:
        error.gained = position - first
        raise


@contextmanager
def _open_range(file: HubFile, first: int, last: int, storage: str | None) -> Iterator[tuple[int, Iterator[bytes]]]:
    """(offset, pieces) of bytes first … last - 1; the offset is 0 if the whole file is sent instead."""
    from huggingface_hub import constants, get_session, hf_raise_for_status

    headers = {"Accept-Encoding": "identity"} if storage else connection.request_headers()
    headers["Range"] = f"bytes={first}-{last - 1}"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with (
        translate_errors(file, reads_bytes=True),
        get_session().stream("GET", storage or _url(file), headers=headers, timeout=timeout) as response,
    ):
        hf_raise_for_status(response)
        partial = response.status_code == 206
        if partial and not response.headers.get("Content-Range", "").startswith(f"bytes {first}-"):
            raise TransientError("sent other bytes than it was asked for")
        yield first if partial else 0, response.iter_bytes()


def retry(attempt: Callable[[], Result], file: str, stop: threading.Event) -> Result:
    """attempt(), again while it raises TransientError, with longer and longer waits. Raises UserError after TRIES in a
    row without progress, Cancelled once `stop` is set. `file` names it in messages.
    """
    tries = 0
    while True:
        try:
            return attempt()
        except TransientError as error:
            tries = 1 if error.gained >= PROGRESS else tries + 1
            if tries == TRIES:
                raise UserError(
                    f"{file}: the hub {error}, {TRIES} times in a row. What arrived is kept: "
                    "run the download again when hub and network work."
                ) from None
            wait = error.wait if error.wait is not None else min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tries - 1))
            if wait > PATIENCE:
                raise UserError(
                    f"{file}: the hub {error} and asks to wait {wait:.0f} seconds. What arrived is kept: "
                    "run the download again then."
                ) from None
            log_above_bar(f"{file}: the hub {error}; next try in {wait:.0f} s")
        if stop.wait(wait):
            raise Cancelled
