"""Asks the Hugging Face Hub for files and their hashes. Every failure of the Hub or the network becomes TransientError
(worth another try) or a UserError with a remedy. A token is in none of them.

huggingface_hub knows the Hub: addresses, the token, the meaning of answers. hf_hub_download is not used: since release
2 an interrupted download starts again from nothing (huggingface_hub 2.4.0, file_download.py,
_download_to_tmp_and_move), and one file here has 15 GB. The text of a caught error is never passed on: it may hold a
signed address, or anything that a server sent. The library is imported inside functions, because it reads its
environment (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE) when it is imported, and only the download needs it.
"""

import errno
import json
import os
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from kohaku_delta.errors import UserError
from kohaku_delta.hub import progress
from kohaku_delta.hub.pins import HubFile

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds, doubled from try to try
TRIES = 12  # in a row without progress: six minutes of waiting
PROGRESS = 1 << 20  # bytes after which the count of tries starts again
BATCH = 500  # files per request for hashes
PATIENCE = 900  # seconds; if the Hub asks for a longer wait, the download ends
TOKEN = re.compile(r"[\x21-\x7e]+")
NO_URL = "Correct the url in params.yaml (download.inputs)."
NO_HUB = "Correct HF_ENDPOINT, or look at the proxy."
OTHER_MIRROR = "name a mirror that has the file with --mirror."
Result = TypeVar("Result")


class TransientError(Exception):
    """A failure that may pass. `wait`: what the Hub asked for, in seconds; `gained`: bytes that arrived before it."""

    def __init__(self, words: str, wait: float | None = None):
        super().__init__(words)
        self.wait, self.gained = wait, 0


class Unreachable(TransientError):
    """No connection to the Hub: nothing answers, or there is no network."""


class Cancelled(Exception):
    """Another file failed, or the user pressed Ctrl-C."""


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


def token() -> str | None:
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import get_token

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None
    try:
        token = get_token()
    except errors.OIDCError:
        raise UserError(
            "HF_OIDC_RESOURCE is set, and no token could be had for it. Set HF_OIDC_ID_TOKEN, or unset both and set "
            "HF_TOKEN."
        ) from None
    except UnicodeDecodeError:
        token = " "
    if token is not None and not TOKEN.fullmatch(token):
        raise UserError(
            f"The token in {_token_source()} has characters that no token has. Set it again, without quotes and spaces."
        )
    return token


def _token_source() -> str:
    """Where huggingface_hub takes the token from (utils/_auth.py: get_token)."""
    from huggingface_hub import constants

    if os.environ.get("HF_OIDC_RESOURCE"):
        return "HF_OIDC_RESOURCE"
    variable = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), None)
    return variable if variable and os.environ[variable].strip() else constants.HF_TOKEN_PATH


def _endpoint() -> str:
    """The address of the Hub as messages show it, without a password."""
    from huggingface_hub import constants

    return re.sub("//[^/@]*@", "//…@", constants.ENDPOINT)


def _check_settings() -> None:
    """Raises UserError for settings of the environment with which no request can succeed."""
    import httpx2
    from huggingface_hub import constants, get_session

    if not re.match("https?://[^/]", constants.ENDPOINT):
        raise UserError(f"HF_ENDPOINT is {constants.ENDPOINT!a}. It must begin with https:// (or http://).")
    try:
        get_session()  # reads the variables of proxies and certificates
    except ImportError:
        raise UserError(
            "A proxy of the environment (ALL_PROXY, HTTPS_PROXY or HTTP_PROXY) is a SOCKS proxy, which needs the "
            "package socksio. Install it (`pip install socksio`), or name an HTTP proxy."
        ) from None
    except (ValueError, httpx2.InvalidURL):
        raise UserError(
            "A proxy of the environment (ALL_PROXY, HTTPS_PROXY or HTTP_PROXY) has no address that can be used. It "
            "must be http://HOST:PORT, https://HOST:PORT or socks5://HOST:PORT."
        ) from None
    except OSError as error:
        variable = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), "SSL_CERT_FILE")
        raise UserError(
            f"The certificates that {variable} names ({os.environ.get(variable)}) cannot be read: "
            f"{error.strerror or type(error).__name__}. Correct or unset it."
        ) from None


def require_online(what: str) -> None:
    """Raises UserError if the environment forbids the network. what: what needs it."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise UserError(f"{what}, and HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids it. Unset it.")


def _headers() -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers(token=token() or False, library_name="kohaku-delta") | {"Accept-Encoding": "identity"}


def api():
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT, token=token() or False, library_name="kohaku-delta")


def _url(file: HubFile) -> str:
    from huggingface_hub import constants, hf_hub_url

    return hf_hub_url(file.repo, file.file, repo_type=file.kind, revision=file.revision, endpoint=constants.ENDPOINT)


def head_file(file: HubFile) -> RemoteFile:
    """Size and hash of a file at its revision. Raises TransientError, UserError."""
    from huggingface_hub import constants, get_hf_file_metadata

    with translate_errors(file):
        answer = get_hf_file_metadata(
            _url(file), headers=_headers(), token=False, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    if answer.commit_hash is None:
        raise UserError(_no_hub(answer.location))
    etag = answer.etag or ""
    if answer.size is None or answer.size < 0 or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag):
        raise UserError(f"{_endpoint()} does not give size and hash of {file.file}, as a hub does. {NO_HUB}")
    if file.revision is not None and answer.commit_hash != file.revision:
        raise UserError(
            f"{_endpoint()} answers for the revision {answer.commit_hash[:40]!a} of {file.repo} where {file.revision} "
            f"was asked for. {NO_HUB}"
        )
    storage = None if answer.location.startswith(constants.ENDPOINT + "/") else answer.location
    sha256, git = (etag, None) if len(etag) == 64 else (None, etag)
    return RemoteFile(answer.size, sha256, git, storage)


def _no_hub(location: str) -> str:
    """What to say of an answer without a revision, which `location` gave or sends on to."""
    from huggingface_hub import constants

    target = re.match("https?://[^/?#@]+", location)
    if target and not location.startswith(constants.ENDPOINT + "/"):
        return f"{_endpoint()} is no hub: it sends on to {target[0][:200]!a}. Set HF_ENDPOINT to that address."
    return f"{_endpoint()} does not answer as a hub does (no revision). {NO_HUB}"


def latest_commit(file: HubFile) -> str:
    """The commit at the end of the repository's main branch. Raises TransientError, UserError."""
    from huggingface_hub import constants

    with translate_errors(file), _translate_parse_errors():
        info = api().repo_info(file.repo, repo_type=file.kind, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
        raise UserError(f"{_endpoint()} does not give the commit of main of {file.repo}. {NO_HUB}")
    return info.sha


def list_files(files: list[HubFile]) -> dict[str, RemoteFile]:
    """Size and hash of these files of one revision, by name; files that do not exist are left out. Raises
    TransientError, UserError.
    """
    from huggingface_hub import RepoFile

    found = {}
    for start in range(0, len(files), BATCH):
        names, first = [file.file for file in files[start : start + BATCH]], files[start]
        with translate_errors(first), _translate_parse_errors():
            answers = api().get_paths_info(first.repo, names, revision=first.revision, repo_type=first.kind)
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

    headers = {"Accept-Encoding": "identity"} if storage else _headers()
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


@contextmanager
def _translate_parse_errors() -> Iterator[None]:
    """What huggingface_hub raises for an answer without the fields that it expects."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
        raise UserError(f"{_endpoint()} sent an answer that cannot be understood. {NO_HUB}") from None


@contextmanager
def translate_errors(file: HubFile, reads_bytes: bool = False) -> Iterator[None]:
    """Turns the errors of huggingface_hub and its HTTP client into TransientError or UserError, in our own words.
    reads_bytes: whether the storage may answer, from a signed address.
    """
    import httpx2
    from huggingface_hub import errors

    _check_settings()
    where = f"{_endpoint()}/{'datasets/' if file.kind == 'dataset' else ''}{file.repo}"
    try:
        yield
        return
    except (httpx2.UnsupportedProtocol, httpx2.TooManyRedirects, httpx2.InvalidURL) as error:
        sentence = f"{_endpoint()} cannot be read from ({type(error).__name__}). {NO_HUB}"
    except httpx2.RequestError as error:
        if certificate := _certificate_error(error):
            raise UserError(
                f"{_endpoint()}: its certificate is not trusted ({certificate}). If your network has an authority of "
                "its own, set SSL_CERT_FILE to its certificates."
            ) from None
        if isinstance(error, httpx2.ProxyError) and (refusal := re.match("4[0-9]{2}", str(error))):
            raise UserError(
                f"The proxy of the environment (HTTPS_PROXY or ALL_PROXY) refused {_endpoint()}: it answered "
                f"{refusal[0]}. Correct its address, user and password."
            ) from None
        is_lost = isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError))
        kind = Unreachable if is_lost else TransientError
        raise kind(f"could not be read from ({type(error).__name__})") from None
    except errors.OfflineModeIsEnabled:
        sentence = (
            f"{file.file} of {file.repo} is not in the mirror, and HF_HUB_OFFLINE forbids downloading it. "
            "Unset it, or name a mirror that has the file with --mirror."
        )
    except errors.GatedRepoError:
        terms = "Accept its terms there with"
        sentence = (
            f"{where} is gated. {terms} your account, then set HF_TOKEN to a token of that account."
            if token() is None
            else f"{where} is gated, and the token in {_token_source()} is not entitled to it. {terms} the token's "
            "account."
        )
    except errors.RevisionNotFoundError:
        sentence = f"{where} has no revision {file.revision}. {NO_URL}"
    except errors.EntryNotFoundError:
        sentence = f"{where} has no file {file.file} at the revision {file.revision}. {NO_URL}"
    except errors.RepositoryNotFoundError:
        who = (
            "nobody without a token (HF_TOKEN)" if token() is None else f"the account of the token in {_token_source()}"
        )
        sentence = f"{where} does not exist, or not for {who}. Check the url in params.yaml, or {OTHER_MIRROR}"
    except errors.HfHubHTTPError as error:
        _raise_transient(error, reads_bytes)
        status = error.response.status_code
        sentence = (
            f"{where} wants a token (401). Set HF_TOKEN."
            if status == 401 and token() is None
            else f"{where}: the token in {_token_source()} is not valid (401). Make a new one; public files need none."
            if status == 401
            else f"The proxy of the environment (HTTP_PROXY or ALL_PROXY) wants another user or password ({status})."
            if status == 407
            else f"{_endpoint()} is no hub, or not one with {file.repo}: it answered {status} and no reason. Correct "
            f"HF_ENDPOINT, or {OTHER_MIRROR}"
            if status in (400, 404, 405, 410)
            else f"{where} refused {file.file} ({error.response.status_code}). "
            f"Check that your account may read it, or {OTHER_MIRROR}"
        )
    except errors.HFValidationError:
        sentence = f"{file.repo} is not the name of a repository. {NO_URL}"
    raise UserError(sentence) from None


def _certificate_error(error: BaseException | None) -> str | None:
    """Why a certificate was refused, if an error came from that."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error.verify_message[:200] if error else None


def _raise_transient(error, reads_bytes: bool) -> None:
    """Raises TransientError for a status that may change, and for every status of the storage (its address expires)."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.utils import parse_ratelimit_headers

    status, headers = error.response.status_code, error.response.headers
    origin, answered = (
        (url.scheme, url.host, url.port) for url in (httpx2.URL(constants.ENDPOINT), error.response.url)
    )
    if status in (408, 425, 429) or status >= 500 or (reads_bytes and answered != origin):
        limit = parse_ratelimit_headers(headers) if status == 429 else None
        wait = headers.get("Retry-After", "").strip()
        if limit and not limit.remaining:
            wait = str(limit.reset_in_seconds)
        raise TransientError(f"answered {status}", float(wait[:9]) if wait.isdecimal() else None) from None


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
            progress.log_above_bar(f"{file}: the hub {error}; next try in {wait:.0f} s")
        if stop.wait(wait):
            raise Cancelled
