"""Signatures of the provenance: DSSE envelopes with an ed25519, ECDSA or RSA key, by securesystemslib, offline.

Nothing in an envelope is trusted before a signature by the given key over all of it was verified. Keys are the user's
PEM files; this project has none.
"""

import base64
import json
from pathlib import Path
from typing import Any

from kohaku_delta import atomic_files
from kohaku_delta.errors import UserError
from kohaku_delta.regular_files import read_regular

PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_BYTES = 16 << 20
MAX_KEY = 1 << 20  # the largest RSA keys have some kilobytes
ENVELOPE_FIELDS, SIGNATURE_FIELDS = {"payload", "payloadType", "signatures"}, {"keyid", "sig"}


MAKE_KEY = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem"  # signs releases too
NOT_PRIVATE = f"is not a private key that can sign: an unencrypted PEM file was expected ({MAKE_KEY})."
NOT_PUBLIC = "is not a public key that can be used: a PEM file was expected (openssl pkey -in key.pem -pubout)."


def _read_key(key: Path) -> bytes:
    """The content of a key's file, which may be a pipe: `--key <(…)`. Raises ValueError for a folder or a long file."""
    if key.is_dir():
        raise ValueError
    with key.open("rb") as file:
        content = file.read(MAX_KEY + 1)
    if len(content) > MAX_KEY:
        raise ValueError
    return content


def read_private_key(key: Path) -> Any:
    """The key in a PEM file, of whatever kind. Raises UserError if there is none, or it is encrypted."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(_read_key(key), None)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{key} does not exist. `{MAKE_KEY}` makes a key; keep it out of the repository.") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):  # the library's message may quote the key
        raise UserError(f"{key} {NOT_PRIVATE}") from None


def read_public_key(key: Path) -> Any:
    """The same of a public key."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        return load_pem_public_key(_read_key(key))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{key} does not exist. Name the signer's public key; `openssl pkey -in key.pem -pubout` gives the one of "
            "a private key."
        ) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(f"{key} {NOT_PUBLIC}") from None


def sign(statement: dict[str, Any], key: Path, out: Path) -> str:
    """Writes the signed envelope to `out`; returns the key's id. Raises UserError if `key` is not an unencrypted
    private key in PEM form.
    """
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner

    try:
        signer = CryptoSigner(read_private_key(key))
    except ValueError:  # a kind of key that signs nothing
        raise UserError(f"{key} {NOT_PRIVATE}") from None
    payload = json.dumps(statement, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    key_id = envelope.sign(signer).keyid
    with atomic_files.atomic_write(out, "w") as file:
        json.dump(envelope.to_dict(), file, indent=1, sort_keys=True)
        file.write("\n")
    return key_id


def verify_signature(path: Path, key: Path) -> bytes:
    """The payload of an envelope that the owner of this public key signed. Raises UserError for any other envelope."""
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import SSlibKey

    try:
        public = SSlibKey.from_crypto(read_public_key(key))
    except ValueError:  # a kind of key that signs nothing
        raise UserError(f"{key} {NOT_PUBLIC}") from None
    name, remedy = path.name, "Nothing in it is trusted."
    if not path.is_file():
        raise UserError(f"{name} does not exist: this rebuild was not signed.")
    text = read_regular(path, MAX_BYTES)
    try:
        content = json.loads(text)
        unknown = sorted(content.keys() - ENVELOPE_FIELDS)
        unknown += [field for entry in content["signatures"] for field in sorted(entry.keys() - SIGNATURE_FIELDS)]
        envelope = Envelope.from_dict(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{name} is not a signed envelope (DSSE). {remedy}") from None
    if unknown:
        raise UserError(f"{name}: the envelope's field {unknown[0]!r:.60} is not known. {remedy}")
    if envelope.payload_type != PAYLOAD_TYPE:
        raise UserError(f"{name} signs a {envelope.payload_type!r:.60}, not {PAYLOAD_TYPE}. {remedy}")
    try:
        envelope.verify([public], 1)
    except VerificationError:
        signers = ", ".join(key_id[:16] + "…" for key_id in envelope.signatures) or "nobody"
        raise UserError(
            f"{name}: no signature of {key} ({public.keyid[:16]}…) is valid; it names {signers}. {remedy}"
        ) from None
    return envelope.payload


def unverified_payload(path: Path) -> bytes:
    """The payload of an envelope that nobody verified: to find what contradicts it, never to trust it."""
    try:
        return base64.b64decode(json.loads(read_regular(path, MAX_BYTES))["payload"], validate=True)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path.name} is not a signed envelope (DSSE).") from None
