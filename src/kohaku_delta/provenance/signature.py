"""Invariant: nothing in an envelope is parsed before a signature of the given key over all of it was verified.

DSSE with an ed25519, ECDSA or RSA key, by securesystemslib, offline. Keys are PEM files of the user's; this project has
none.
"""

import json
from pathlib import Path

from kohaku_delta import atomic_files
from kohaku_delta.errors import UserError

TYPE = "application/vnd.in-toto+json"
MOST = 64 << 20
FIELDS, SIGNATURE = {"payload", "payloadType", "signatures"}, {"keyid", "sig"}


def sign(statement: dict, key: Path, out: Path) -> str:
    """Writes the signed envelope; returns the key's id. Refuses a file that is no unencrypted private key in PEM form."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner

    try:
        signer = CryptoSigner(load_pem_private_key(key.read_bytes(), None))
    except FileNotFoundError:
        raise UserError(
            f"{key} is not there. `openssl genpkey -algorithm ed25519 -out key.pem` makes a key; keep it out of the repository."
        ) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):  # what the library says of a key may quote it
        raise UserError(
            f"{key} is no private key that can sign: an unencrypted PEM file with an ed25519 key was expected (openssl genpkey -algorithm ed25519)."
        ) from None
    envelope = Envelope(
        json.dumps(statement, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(), TYPE, {}
    )
    keyid = envelope.sign(signer).keyid
    with atomic_files.atomic_write(out, "w") as file:
        json.dump(envelope.to_dict(), file, indent=1, sort_keys=True)
        file.write("\n")
    return keyid


def verify_signature(path: Path, key: Path) -> bytes:
    """The payload of an envelope that this public key's owner signed. Refuses any other by name."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import SSlibKey

    try:
        public = SSlibKey.from_crypto(load_pem_public_key(key.read_bytes()))
    except FileNotFoundError:
        raise UserError(
            f"{key} is not there. Name the signer's public key; `openssl pkey -in key.pem -pubout` gives the one of a private key."
        ) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(
            f"{key} is no public key that can be used: a PEM file was expected (openssl pkey -in key.pem -pubout)."
        ) from None
    if not path.is_file():
        raise UserError(f"{path.name} is not there: this rebuild was not signed.")
    if path.stat().st_size > MOST:
        raise UserError(f"{path.name} has {path.stat().st_size:,} bytes, more than a provenance may have.")
    try:
        content = json.loads(path.read_bytes())
        if unknown := sorted(content.keys() - FIELDS) + [
            field for each in content["signatures"] for field in sorted(each.keys() - SIGNATURE)
        ]:
            raise UserError(
                f"{path.name}: the envelope's field {unknown[0]!r:.60} is not known. Nothing in it is believed."
            )
        envelope = Envelope.from_dict(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path.name} is no signed envelope (DSSE). Nothing in it is believed.") from None
    if envelope.payload_type != TYPE:
        raise UserError(f"{path.name} signs a {envelope.payload_type!r:.60}, not {TYPE}. Nothing in it is believed.")
    try:
        envelope.verify([public], 1)
    except VerificationError:
        signers = ", ".join(keyid[:16] + "…" for keyid in envelope.signatures) or "nobody"
        raise UserError(
            f"{path.name}: no signature of {key} ({public.keyid[:16]}…) holds; it names {signers}. Nothing in it is believed."
        ) from None
    return envelope.payload
