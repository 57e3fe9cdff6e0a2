"""Bundles: what a stranger needs to audit a rebuild, without its weights, as a tar or a folder.

The bytes of a bundle depend on its contents only: members are in the order of their names, without owner or date.
Reading accepts plain files with the names that a bundle may have, once each and up to a size, and refuses anything else
by name; nothing is written outside a temporary folder.
"""

import hashlib
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator

from kohaku_delta import strict_model
from kohaku_delta.errors import UserError
from kohaku_delta.formats import dtypes, hashing, safetensors_header, safetensors_io
from kohaku_delta.formats.safetensors_header import TensorSpec, content_digest
from kohaku_delta.parallel import ordered_map
from kohaku_delta.provenance.stage_record import Count, Sha256
from kohaku_delta.regular_files import open_regular
from kohaku_delta.strict_model import StrictModel

MANIFEST, TENSORS, LIBRARIES, PROVENANCE = "bundle.json", "tensors.json", "requirements", "provenance.json"
WEIGHTS = ".safetensors"
MEMBER = re.compile(
    r"((bundle|tensors|provenance)\.json|requirements/[\w-][\w.-]*|dvc\.yaml|dvc\.lock|params\.yaml|pins-[\w-]+\.csv|"
    r"build/(?:[\w-][\w.-]*/){0,3}[\w-][\w.-]*)"
)
MAX_OUTPUT = 16 << 20  # bytes of an output that is no table; a larger one is left out
MAX_MEMBERS = 10_000
MAX_MEMBER_BYTES = 16 << 30  # the release's captions take about 1 GB
MAX_JSON_BYTES = 16 << 20  # the release's tensors.json takes about 3 MB
MAX_EXTENSION = 1 << 20  # bytes of a member's extended header
EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
FOREIGN = "The bundle was not written by kohaku-delta."


class Bundle(StrictModel):
    """bundle.json. files: sha256 of each; left_out: bytes of each output that is not in it."""

    format: Literal["kohaku-delta bundle 1"]
    files: dict[str, Sha256]
    left_out: dict[str, Count]


class Tensor(StrictModel):
    dtype: Literal[tuple(dtypes.BYTES)]  # type: ignore[valid-type]
    shape: Annotated[list[Count], Field(max_length=safetensors_header.MAX_DIMENSIONS)]
    sha256: Sha256

    @field_validator("shape")
    @classmethod
    def _possible(cls, shape: list[int]) -> list[int]:
        if safetensors_header.is_too_large(shape):
            raise ValueError(f"{shape!r:.80} is not a shape of a tensor")
        return shape


class WeightsDigest(StrictModel):
    """A safetensors file: content digest, and its tensors by name."""

    digest: Sha256
    tensors: dict[str, Tensor]


Tensors = dict[str, WeightsDigest]  # by output path


def read_manifest(folder: Path) -> Bundle:
    """The bundle.json of a bundle's folder. Raises UserError if the folder holds anything that no bundle holds."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or (path.is_file() and MEMBER.fullmatch(name))):
            raise UserError(f"{name} is not a plain file that a bundle may hold. {FOREIGN}")
    return strict_model.read_json(folder / MANIFEST, Bundle, MAX_JSON_BYTES, FOREIGN)


def read_tensor_digests(path: Path) -> Tensors:
    """The content of a tensors.json. Raises UserError if a file's digest does not follow from its tensors."""
    if not path.is_file():
        return {}
    weights_digests = strict_model.read_json(path, Tensors, MAX_JSON_BYTES, FOREIGN)
    for out, weights in weights_digests.items():
        specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.tensors.items()}
        if content_digest(specs, {name: tensor.sha256 for name, tensor in weights.tensors.items()}) != weights.digest:
            raise UserError(f"{path.name}: the digest of {out} does not follow from its tensors: it was edited.")
    return weights_digests


def digest_weights(folder: Path, outs: list[str]) -> Tensors:
    """Digests of safetensors files and their tensors; reads them whole, on all cores."""
    return {out: _digest_file(folder / out) for out in outs}


def _digest_file(path: Path) -> WeightsDigest:
    with safetensors_io.open_file(path) as file:

        def sha256(name: str) -> str:
            digest = hashlib.sha256()
            for chunk in file.iter_chunks(name):
                digest.update(chunk)
            return digest.hexdigest()

        hashes = dict(zip(file.specs, ordered_map(sha256, file.specs), strict=True))
        tensors = {
            name: Tensor(dtype=spec.dtype, shape=list(spec.shape), sha256=hashes[name])
            for name, spec in file.specs.items()
        }
        return WeightsDigest(digest=content_digest(file.specs, hashes), tensors=tensors)


@contextmanager
def unpack_bundle(path: Path) -> Iterator[Path]:
    """A temporary folder with the members of a bundle's tar. Raises UserError for any other file."""
    remedy = "Name a recipe's folder, or what `kohaku-delta bundle` wrote."
    with tempfile.TemporaryDirectory(prefix="kohaku-delta-") as folder:
        try:
            with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as tar:
                _unpack(tar, Path(folder), path)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{path}: a member is a file and a folder at once. {FOREIGN}") from None
        except (tarfile.TarError, EOFError, ValueError, UnicodeError, RecursionError) as error:
            raise UserError(f"{path} is not a bundle: {error}. {remedy}") from None
        if not (Path(folder) / MANIFEST).is_file():
            raise UserError(f"{path} is not a bundle: it holds no {MANIFEST}. {remedy}")
        yield Path(folder)


class _Member(tarfile.TarInfo):
    """A member whose extended headers, which are read as a whole, are small."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        if member.type not in tarfile.SUPPORTED_TYPES or not member.size >= 0:
            raise tarfile.ReadError("it holds a member of an unknown kind")
        if member.type in EXTENSIONS and member.size > MAX_EXTENSION:
            raise tarfile.ReadError(f"a member has an extended header of {member.size:,} bytes")
        return member


def _unpack(tar: tarfile.TarFile, folder: Path, path: Path) -> None:
    for unpacked, member in enumerate(tar):
        target = folder / member.name
        if not member.isreg() or member.issparse():
            fault = "is not a plain file"
        elif not MEMBER.fullmatch(member.name):
            fault = "is nothing that a bundle holds"
        elif target.exists():
            fault = "comes twice"
        elif member.size > MAX_MEMBER_BYTES:
            fault = "is too large"
        elif unpacked >= MAX_MEMBERS:
            fault = "is one too many"
        else:
            fault = ""
        if fault:
            raise UserError(f"{path}: the member {member.name!r:.120} {fault}. {FOREIGN}")
        target.parent.mkdir(parents=True, exist_ok=True)
        source = tar.extractfile(member)
        with open(target, "xb") as file:
            while source and (chunk := source.read(hashing.PIECE)):
                file.write(chunk)
        if target.stat().st_size != member.size:
            raise UserError(f"{path} is cut short in {member.name}. Download it again.")


def _files(folder: Path) -> dict[str, Path]:
    """Name in the folder → path of every file, ordered by name."""
    return dict(sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file()))


def pack_bundle(folder: Path, out: IO[bytes]) -> None:
    """Writes the files of a folder as a tar."""
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, path in _files(folder).items():
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = path.stat().st_size, 0o644, 0
            with open(path, "rb") as file:
                tar.addfile(member, file)


def write_manifest(folder: Path, left_out: dict[str, int]) -> None:
    """Writes the bundle.json of a folder that holds everything else. left_out: bytes of each missing output."""
    files = {name: hashing.digest_path(path, md5=False).sha256 for name, path in _files(folder).items()}
    write_json(folder / MANIFEST, {"format": "kohaku-delta bundle 1", "files": files, "left_out": left_out})


def json_text(content: Any) -> str:
    """The text of bundle.json and tensors.json: the same for the same content."""
    return json.dumps(content, indent=1, sort_keys=True, default=BaseModel.model_dump) + "\n"


def write_json(path: Path, content: Any) -> None:
    path.write_text(json_text(content), encoding="utf-8")
