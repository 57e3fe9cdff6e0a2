"""Errors of the Hub, the network and huggingface_hub in our own words: TransientError (worth another try) or a
UserError with a remedy.

The text of a caught error is never passed on: it may hold the token, a signed address, or anything that a server sent.
"""

import json
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from kohaku_delta.errors import UserError
from kohaku_delta.hub import connection
from kohaku_delta.hub.pins import HubFile

CORRECT_URL = "Correct the url in params.yaml (download.inputs)."
CORRECT_ENDPOINT = "Correct HF_ENDPOINT, or look at the proxy."
OTHER_MIRROR = "name a mirror that has the file with --mirror."


class TransientError(Exception):
    """A failure that may pass. `wait`: what the Hub asked for, in seconds; `gained`: bytes that arrived before it."""

    def __init__(self, words: str, wait: float | None = None):
        super().__init__(words)
        self.wait, self.gained = wait, 0


class Unreachable(TransientError):
    """No connection to the Hub: nothing answers, or there is no network."""


class Cancelled(Exception):
    """Another file failed, or the user pressed Ctrl-C."""


@contextmanager
def translate_errors(file: HubFile, reads_bytes: bool = False) -> Iterator[None]:
    """Turns the errors of huggingface_hub and its HTTP client into TransientError or UserError, in our own words.
    reads_bytes: whether the storage may answer, from a signed address.
    """
    import httpx2
    from huggingface_hub import errors

    connection.check_settings()
    where = f"{connection.endpoint()}/{'datasets/' if file.kind == 'dataset' else ''}{file.repo}"
    try:
        yield
        return
    except (httpx2.UnsupportedProtocol, httpx2.TooManyRedirects, httpx2.InvalidURL) as error:
        sentence = f"{connection.endpoint()} cannot be read from ({type(error).__name__}). {CORRECT_ENDPOINT}"
    except httpx2.RequestError as error:
        raise _describe_request_error(error) from None
    except errors.OfflineModeIsEnabled:
        sentence = (
            f"{file.file} of {file.repo} is not in the mirror, and HF_HUB_OFFLINE forbids downloading it. "
            "Unset it, or name a mirror that has the file with --mirror."
        )
    except errors.GatedRepoError:
        if connection.token() is None:
            sentence = (
                f"{where} is gated. Accept its terms there with your account, then set HF_TOKEN to a token of that "
                "account."
            )
        else:
            sentence = (
                f"{where} is gated, and the token in {connection.token_source()} is not entitled to it. Accept its "
                "terms there with the token's account."
            )
    except errors.RevisionNotFoundError:
        sentence = f"{where} has no revision {file.revision}. {CORRECT_URL}"
    except errors.EntryNotFoundError:
        sentence = f"{where} has no file {file.file} at the revision {file.revision}. {CORRECT_URL}"
    except errors.RepositoryNotFoundError:
        who = (
            "nobody without a token (HF_TOKEN)"
            if connection.token() is None
            else f"the account of the token in {connection.token_source()}"
        )
        sentence = f"{where} does not exist, or not for {who}. Check the url in params.yaml, or {OTHER_MIRROR}"
    except errors.HfHubHTTPError as error:
        _raise_transient(error, reads_bytes)
        sentence = _describe_refusal(error.response.status_code, file, where)
    except errors.HFValidationError:
        sentence = f"{file.repo} is not the name of a repository. {CORRECT_URL}"
    raise UserError(sentence) from None


@contextmanager
def translate_parse_errors() -> Iterator[None]:
    """What huggingface_hub raises for an answer without the fields that it expects."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
        raise UserError(
            f"{connection.endpoint()} sent an answer that cannot be understood. {CORRECT_ENDPOINT}"
        ) from None


def _describe_request_error(error: Exception) -> TransientError | UserError:
    """What to raise for a request that got no answer."""
    import httpx2

    if certificate := _certificate_error(error):
        return UserError(
            f"{connection.endpoint()}: its certificate is not trusted ({certificate}). If your network has an "
            "authority of its own, set SSL_CERT_FILE to its certificates."
        )
    if isinstance(error, httpx2.ProxyError) and (refusal := re.match("4[0-9]{2}", str(error))):
        return UserError(
            f"The proxy of the environment (HTTPS_PROXY or ALL_PROXY) refused {connection.endpoint()}: it answered "
            f"{refusal[0]}. Correct its address, user and password."
        )
    is_lost = isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError))
    kind = Unreachable if is_lost else TransientError
    return kind(f"could not be read from ({type(error).__name__})")


def _describe_refusal(status: int, file: HubFile, where: str) -> str:
    """What to say of an HTTP status that does not change by itself."""
    if status == 401 and connection.token() is None:
        return f"{where} requires a token (401). Set HF_TOKEN."
    if status == 401:
        return (
            f"{where}: the token in {connection.token_source()} is not valid (401). Make a new one; public files need "
            "none."
        )
    if status == 407:
        return f"The proxy of the environment (HTTP_PROXY or ALL_PROXY) requires another user or password ({status})."
    if status in (400, 404, 405, 410):
        return (
            f"{connection.endpoint()} is not a hub, or not one with {file.repo}: it answered {status} and no reason. "
            f"Correct HF_ENDPOINT, or {OTHER_MIRROR}"
        )
    return f"{where} refused {file.file} ({status}). Check that your account may read it, or {OTHER_MIRROR}"


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
