"""Invariant: whatever the hub or the network does ends as bytes, as `Passing` (worth another try) or as a sentence; a
token is in none of them.

huggingface_hub knows the hub: addresses, the token, what an answer means. Its hf_hub_download is not used: since its
release 2 a broken download starts from nothing (huggingface_hub 2.4.0, file_download.py, _download_to_tmp_and_move),
and one file here has 15 GB. An error's own text is never passed on: it may hold a signed address, or anything that a
server wrote. The library is imported late, because it reads its environment (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE)
when it is imported, and only the download needs it.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from kohaku_delta.errors import UserError
from kohaku_delta.hub import concurrency
from kohaku_delta.hub.pins import HubFile

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds, doubled from try to try
TRIES = 12  # in a row that gained nothing: six minutes of waiting
GAIN = 1 << 20  # bytes that begin a new row
BATCH = 500  # files of one question
PATIENCE = 900  # seconds; a hub that asks for more is asked another day
TOKEN = re.compile(r"[\x21-\x7e]+")
Result = TypeVar("Result")


class TransientError(Exception):
    """A fault that may pass: `wait` is what the hub asked for, in seconds; `gained` what arrived before it."""

    def __init__(self, words: str, wait: float | None = None, gained: int = 0):
        super().__init__(words)
        self.wait, self.gained = wait, gained


class Cancelled(Exception):
    """Another file's end, or the user, stops this one."""


@dataclass(frozen=True)
class RemoteFile:
    """What the hub says of a file: its size, and its sha256 (LFS files) or git's digest of it (small ones)."""

    size: int
    sha256: str | None
    git: str | None
    storage: str | None = field(
        default=None, repr=False
    )  # the signed address of a large file's bytes; never to be shown

    @property
    def mark(self) -> str:
        return (self.sha256 or self.git)[:16]


def _token() -> str | None:
    from huggingface_hub.utils import get_token

    token = get_token()
    if token is not None and not TOKEN.fullmatch(token):
        raise UserError(
            "The token in HF_TOKEN has characters that no token has. Set it again, without quotes and blanks."
        )
    return token


def _headers() -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers(token=_token() or False, library_name="kohaku-delta") | {"Accept-Encoding": "identity"}


def file_url(place: HubFile) -> str:
    from huggingface_hub import constants, hf_hub_url

    return hf_hub_url(
        place.repo, place.file, repo_type=place.kind, revision=place.revision, endpoint=constants.ENDPOINT
    )


def head_file(place: HubFile) -> RemoteFile:
    """What the hub says of a file at its revision. Raises Passing, or a Refusal."""
    from huggingface_hub import constants, get_hf_file_metadata

    with translate_errors(place):
        told = get_hf_file_metadata(
            file_url(place), headers=_headers(), token=False, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    etag = told.etag or ""
    if told.commit_hash is None or (told.size or -1) < 0 or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag):
        raise TransientError(
            "did not say size and digest of the file, as a hub does (check HF_ENDPOINT, proxy and firewall)"
        )
    if place.revision is not None and told.commit_hash != place.revision:
        raise TransientError(f"answered for the revision {told.commit_hash[:40]!r}")
    storage = None if told.location.startswith(constants.ENDPOINT + "/") else told.location
    return RemoteFile(told.size, *((etag, None) if len(etag) == 64 else (None, etag)), storage)


def latest_commit(place: HubFile) -> str:
    """The commit that the repository's main branch points at now. Raises Passing, or a Refusal."""
    from huggingface_hub import constants

    with translate_errors(place), _translate_parse_errors():
        told = _api().repo_info(place.repo, repo_type=place.kind, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha or ""
    if not re.fullmatch(r"[0-9a-f]{40}", told):
        raise TransientError("did not say which commit main is at")
    return told


def list_files(places: list[HubFile]) -> dict[str, RemoteFile]:
    """What the hub lists of these files of one revision, by name; those that it does not have are missing. Raises
    Passing, or a Refusal.
    """
    from huggingface_hub import RepoFile

    found = {}
    for start in range(0, len(places), BATCH):
        part, one = [place.file for place in places[start : start + BATCH]], places[start]
        with translate_errors(one), _translate_parse_errors():
            listed = _api().get_paths_info(one.repo, part, revision=one.revision, repo_type=one.kind)
        for each in listed:
            if each.path in part and isinstance(each, RepoFile):
                found[each.path] = RemoteFile(
                    each.size, each.lfs.sha256 if each.lfs else None, None if each.lfs else each.blob_id
                )
    return found


@contextmanager
def _translate_parse_errors() -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
        raise TransientError("answered what nobody understands") from None


def _api():
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT, token=_token() or False, library_name="kohaku-delta")


@contextmanager
def open_range(
    place: HubFile, first: int, last: int | None = None, storage: str | None = None
) -> Iterator[tuple[int, Iterator[bytes]]]:
    """(offset, pieces) of a file's bytes from `first` on, to `last`; the offset is 0 where the hub sends the whole file
    instead. Raises Passing, or a Refusal.

    storage: a signed address that `ask` gave, to be read from without asking the hub again, and without the token.
    """
    from huggingface_hub import constants, get_session, hf_raise_for_status

    span = {"Range": f"bytes={first}-{'' if last is None else last}"} if first or last is not None else {}
    headers = {"Accept-Encoding": "identity"} if storage else _headers()
    with (
        translate_errors(place),
        get_session().stream(
            "GET", storage or file_url(place), headers=headers | span, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as response,
    ):
        hf_raise_for_status(response)
        offset = first if response.status_code == 206 else 0
        if response.status_code == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {first}-"):
            raise TransientError("sent other bytes than it was asked for")
        yield offset, response.iter_bytes()


@contextmanager
def translate_errors(place: HubFile) -> Iterator[None]:
    """Turns what huggingface_hub and its HTTP client raise into Passing or a Refusal, in words of our own."""
    import httpx2
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import get_token, parse_ratelimit_headers

    where = f"{constants.ENDPOINT}/{'datasets/' if place.kind == 'dataset' else ''}{place.repo}"
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise UserError(
            f"{place.file} of {place.repo} is not in the mirror, and HF_HUB_OFFLINE forbids to fetch it. Unset it, or name a mirror that has it (--mirror)."
        ) from None
    except errors.GatedRepoError:
        if get_token() is None:
            raise UserError(
                f"{where} is gated. Accept its terms there with your account, then set HF_TOKEN to a token of that account."
            ) from None
        raise UserError(
            f"{where} is gated, and the token in HF_TOKEN is not entitled to it. Accept its terms there with the account that the token belongs to."
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{where} has no revision {place.revision}. Mend the url in params.yaml (download.inputs)."
        ) from None
    except errors.EntryNotFoundError:
        raise UserError(
            f"{where} has no file {place.file} at the revision {place.revision}. Mend the url in params.yaml (download.inputs)."
        ) from None
    except errors.RepositoryNotFoundError:
        who = "nobody without a token (HF_TOKEN)" if get_token() is None else "the account of the token in HF_TOKEN"
        raise UserError(
            f"{where} is not there, or not for {who}. Check the url in params.yaml, or name a mirror that has the file by --mirror."
        ) from None
    except errors.HfHubHTTPError as error:
        status, headers = error.response.status_code, error.response.headers
        if (
            status in (408, 425, 429)
            or status >= 500
            or not str(error.response.url).startswith(constants.ENDPOINT + "/")
        ):
            limit = parse_ratelimit_headers(headers) if status == 429 else None
            asked = (
                str(limit.reset_in_seconds) if limit and not limit.remaining else headers.get("Retry-After", "").strip()
            )
            raise TransientError(f"answered {status}", float(asked[:9]) if asked.isdecimal() else None) from None
        if status == 401:
            raise UserError(
                f"{where}: the token in HF_TOKEN is not valid (401). Make a new one, or unset HF_TOKEN for what is public."
            ) from None
        raise UserError(
            f"{where} refused {place.file} ({status}). Check that your account may read it, or name a mirror that has the file by --mirror."
        ) from None
    except httpx2.RequestError as error:
        raise TransientError(f"could not be read from ({type(error).__name__})") from None
    except errors.HFValidationError:
        raise UserError(
            f"{place.repo} is not the name of a repository. Mend the url in params.yaml (download.inputs)."
        ) from None


def retry(attempt: Callable[[], Result], file: str, stop: threading.Event) -> Result:
    """attempt(), again and again while what it raises is Passing, with longer and longer waits. Refuses after TRIES in
    a row that gained nothing.
    """
    tries = 0
    while True:
        try:
            return attempt()
        except TransientError as fault:
            tries = 1 if fault.gained >= GAIN else tries + 1
            if tries == TRIES:
                raise UserError(
                    f"{file}: the hub {fault}, {TRIES} times in a row. What arrived is kept: run the download again when hub and network are well."
                ) from None
            wait = fault.wait if fault.wait is not None else min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tries - 1))
            if wait > PATIENCE:
                raise UserError(
                    f"{file}: the hub {fault} and asks to wait {wait:.0f} seconds. What arrived is kept: run the download again then."
                ) from None
            concurrency.log_above_bar(f"{file}: the hub {fault}; next try in {wait:.0f} s")
        if stop.wait(wait):
            raise Cancelled
