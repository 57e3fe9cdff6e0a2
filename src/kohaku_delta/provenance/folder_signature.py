"""model.sig, the signature of OpenSSF model signing over all files of a folder, read and verified without its tool.

Only the form that `make proofs` writes is accepted: a Sigstore bundle with a DSSE envelope, signed by an elliptic-curve
key, over the sha256 of every file. The payload is parsed after the signature over it was verified. Where this reader
and `model_signing verify key` could differ, this one is the stricter.
"""

import base64
import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import FailFast, Field

from kohaku_delta import strict_model
from kohaku_delta.errors import UserError
from kohaku_delta.provenance import signature
from kohaku_delta.provenance.stage_record import Sha256
from kohaku_delta.regular_files import read_regular
from kohaku_delta.strict_model import PartialModel, StrictModel

FILE = "model.sig"
GIT_FILES = (".git", ".gitattributes", ".github", ".gitignore")  # the tool leaves these out, as its default
CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}  # the tool's; with the hash of each
MAX_BYTES = 4 << 20  # of 60 files it has 15 kB
FOREIGN = "`make proofs` did not write it, and nothing in it is trusted."


class _Signature(StrictModel):
    sig: str
    keyid: Literal[""] = ""


class _Envelope(StrictModel):
    payload: str
    payloadType: Literal["application/vnd.in-toto+json"]
    signatures: Annotated[list[_Signature], Field(min_length=1, max_length=1)]


class _PublicKey(StrictModel):
    hint: Sha256


class _Material(StrictModel):
    publicKey: _PublicKey
    tlogEntries: Annotated[list[str], Field(max_length=0)] = []


class _SigstoreBundle(StrictModel):
    mediaType: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"]
    verificationMaterial: _Material
    dsseEnvelope: _Envelope


class _Resource(PartialModel):
    name: str
    algorithm: Literal["sha256"]
    digest: Sha256


class _Serialization(PartialModel):
    method: Literal["files"]


class _Predicate(PartialModel):
    serialization: _Serialization
    resources: Annotated[list[_Resource], FailFast()]


class _Statement(PartialModel):
    predicateType: Literal["https://model_signing/signature/v1.0"]
    predicate: _Predicate


def check_private_key(key: Path) -> None:
    """Raises UserError unless model signing can sign with this private key."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    private = signature.read_private_key(key)
    if not isinstance(private, EllipticCurvePrivateKey) or private.curve.name not in CURVES:
        raise UserError(
            f"{key} is a key that model signing cannot use: it needs an elliptic-curve key (P-256, P-384 or P-521). "
            f"`{signature.MAKE_KEY}` makes one; keep it out of the repository."
        )


def signed_files(path: Path, key: Path) -> dict[str, str]:
    """Name → sha256 of the files that the owner of this public key signed. Raises UserError for anything else."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    public = signature.read_public_key(key)
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name not in CURVES:
        raise UserError(f"{key} is not an elliptic-curve key (P-256, P-384 or P-521), as model signing uses them.")
    content = strict_model.parse_json(path.name, _SigstoreBundle, read_regular(path, MAX_BYTES), FOREIGN)
    form, encoding = serialization.PublicFormat.SubjectPublicKeyInfo, serialization.Encoding.PEM
    hint = hashlib.sha256(public.public_bytes(encoding, form)).hexdigest()
    named = content.verificationMaterial.publicKey.hint
    if named != hint:
        raise UserError(f"{path.name} was signed by another key ({named[:16]}…) than {key} ({hint[:16]}…).")
    payload, signed = _decode(path, content.dsseEnvelope.payload), content.dsseEnvelope.signatures[0].sig
    kind = content.dsseEnvelope.payloadType.encode()
    encoded = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    try:
        public.verify(_decode(path, signed), encoded, ec.ECDSA(getattr(hashes, CURVES[public.curve.name])()))
    except InvalidSignature:
        raise UserError(f"{path.name}: its signature by {key} is not valid. Nothing in it is trusted.") from None
    resources = strict_model.parse_json(path.name, _Statement, payload, FOREIGN).predicate.resources
    files = {resource.name: resource.digest for resource in resources}
    if len(files) < len(resources):
        raise UserError(f"{path.name} names a file twice. {FOREIGN}")
    return files


def _decode(path: Path, text: str) -> bytes:
    try:
        decoded = base64.b64decode(text, validate=True)
    except ValueError:
        decoded = b""
    if base64.b64encode(decoded).decode() != text:
        raise UserError(f"{path.name}: a part of it is not base64. {FOREIGN}")
    return decoded
