"""How the Hub is reached, from the environment: its address, the token, proxies and certificates (HF_ENDPOINT,
HF_TOKEN, HF_HUB_OFFLINE, HTTPS_PROXY, SSL_CERT_FILE and their relatives).

huggingface_hub reads its environment when it is imported, and only a download or an upload needs it, so it is imported
inside functions. Its telemetry is off, unless the user's environment says otherwise: before its first request it would
ask the Hub for a list of programs, read the answer whatever its length, and keep it in the user's home directory.
"""

import os
import re

from kohaku_delta.errors import UserError

TOKEN = re.compile(r"[\x21-\x7e]+")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def token() -> str | None:
    """The user's token; None if there is none. Raises UserError for one that no request can carry."""
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
            f"The token in {token_source()} has characters that no token has. Set it again, without quotes and spaces."
        )
    return token


def token_source() -> str:
    """Where huggingface_hub takes the token from (utils/_auth.py: get_token)."""
    from huggingface_hub import constants

    if os.environ.get("HF_OIDC_RESOURCE"):
        return "HF_OIDC_RESOURCE"
    variable = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), None)
    return variable if variable and os.environ[variable].strip() else constants.HF_TOKEN_PATH


def endpoint() -> str:
    """The address of the Hub as messages show it, without a password."""
    from huggingface_hub import constants

    return re.sub("//[^/@]*@", "//…@", constants.ENDPOINT)


def check_settings() -> None:
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


def request_headers() -> dict[str, str]:
    """The headers of a request to the Hub, with the token."""
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers(token=token() or False, library_name="kohaku-delta") | {"Accept-Encoding": "identity"}


def api():
    """huggingface_hub's client, with the token."""
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT, token=token() or False, library_name="kohaku-delta")
