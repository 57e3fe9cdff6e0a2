"""Invariant: a bundle's bytes depend on what it holds only, and nothing in one is believed, or written outside of a
folder of its own.

Members stand in the order of their names, owned by nobody, dated 0. Reading takes plain files with the names that a
bundle may have, once each, and refuses the rest by name.
"""

import hashlib
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from kohaku_delta import strict_model
from kohaku_delta.errors import UserError
from kohaku_delta.formats import hashing, safetensors_io
from kohaku_delta.formats.safetensors_header import TensorSpec, content_digest
from kohaku_delta.parallel import ordered_map
from kohaku_delta.provenance.stage_record import Count, Sha256
from kohaku_delta.strict_model import StrictModel

MANIFEST, TENSORS, LIBRARIES, PROVENANCE = "bundle.json", "tensors.json", "requirements", "provenance.json"
WEIGHTS = ".safetensors"
MEMBER = re.compile(
    r"((bundle|tensors|provenance)\.json|requirements/[\w-][\w.-]*|dvc\.yaml|dvc\.lock|params\.yaml|pins-[\w-]+\.csv|build/(?:[\w-][\w.-]*/){0,3}[\w-][\w.-]*)"
)
MOST, DEAREST = 10_000, 16 << 30  # members; bytes of one: the release's captions take about 1 GB
JSON_MOST = 64 << 20


class Bundle(StrictModel):
    """bundle.json. files: sha256 of each; left_out: bytes of each out that is not in it."""

    format: Literal["kohaku-delta bundle 1"]
    files: dict[str, Sha256]
    left_out: dict[str, Count]


class Tensor(StrictModel):
    dtype: str
    shape: list[Count]
    sha256: Sha256


class WeightsDigest(StrictModel):
    """A safetensors file: content digest, and its tensors by name."""

    digest: Sha256
    tensors: dict[str, Tensor]


Tensors = dict[str, WeightsDigest]


def read_manifest(folder: Path) -> Bundle:
    """The bundle.json of a bundle's folder. Refuses a folder that holds what no bundle holds."""
    for path in sorted(folder.rglob("*")):
        if (
            path.is_symlink()
            or not (path.is_file() or path.is_dir())
            or (path.is_file() and not MEMBER.fullmatch(path.relative_to(folder).as_posix()))
        ):
            raise UserError(
                f"{path.relative_to(folder)} is nothing that a bundle holds (a plain file of the recipe). The bundle was not written by kohaku-delta."
            )
    return strict_model.read_json(
        folder / MANIFEST, Bundle, JSON_MOST, "`kohaku-delta bundle` did not write this list."
    )


def read_tensor_digests(path: Path) -> Tensors:
    """A tensors.json whose digests follow from its tensors. Refuses one that contradicts itself."""
    if not path.is_file():
        return {}
    found = strict_model.read_json(path, Tensors, JSON_MOST, "`kohaku-delta bundle` did not write this list.")
    for out, weights in found.items():
        specs = {name: TensorSpec(each.dtype, tuple(each.shape)) for name, each in weights.tensors.items()}
        if content_digest(specs, {name: each.sha256 for name, each in weights.tensors.items()}) != weights.digest:
            raise UserError(f"{path.name}: the digest of {out} does not follow from its tensors: it was edited.")
    return found


def digest_weights(folder: Path, outs: list[str]) -> Tensors:
    """Digest and tensors of safetensors files; reads them whole, on all processors."""
    found = {}
    for out in outs:
        with safetensors_io.open_file(folder / out) as file:

            def sha256(name: str, file=file) -> str:
                whole = hashlib.sha256()
                for piece in file.iter_chunks(name):
                    whole.update(piece)
                return whole.hexdigest()

            hashes = dict(zip(file.specs, ordered_map(sha256, file.specs)))
            listed = {
                name: Tensor(dtype=spec.dtype, shape=list(spec.shape), sha256=hashes[name])
                for name, spec in file.specs.items()
            }
            found[out] = WeightsDigest(digest=content_digest(file.specs, hashes), tensors=listed)
    return found


@contextmanager
def unpack_bundle(path: Path) -> Iterator[Path]:
    """A folder with the members of a bundle's tar, gone when the block ends."""
    with tempfile.TemporaryDirectory(prefix="kohaku-delta-") as folder:
        try:
            with tarfile.open(path, "r:") as tar:
                _unpack(tar, Path(folder), path)
        except (FileExistsError, NotADirectoryError):
            raise UserError(
                f"{path}: a member is a file and a folder at once. The bundle was not written by kohaku-delta."
            ) from None
        except (tarfile.TarError, EOFError, ValueError, UnicodeError) as error:
            raise UserError(
                f"{path} is no bundle: {error}. Name a recipe's folder, or what `kohaku-delta bundle` wrote."
            ) from None
        if not (Path(folder) / MANIFEST).is_file():
            raise UserError(
                f"{path} holds no {MANIFEST}: it is no bundle. Name a recipe's folder, or what `kohaku-delta bundle` wrote."
            )
        yield Path(folder)


def _unpack(tar: tarfile.TarFile, folder: Path, path: Path) -> None:
    seen: set[str] = set()
    for member in tar:
        fault = (
            "is no plain file" if not member.isreg() or member.issparse()
            else "is nothing that a bundle holds" if not MEMBER.fullmatch(member.name)
            else "comes twice" if member.name in seen
            else "is too large" if member.size > DEAREST
            else "is one too many" if len(seen) >= MOST
            else None
        )  # fmt: skip
        if fault:
            raise UserError(
                f"{path}: the member {member.name!r:.120} {fault}. The bundle was not written by kohaku-delta."
            )
        seen.add(member.name)
        target = folder / member.name
        if target.exists():  # a folder of that name
            raise UserError(
                f"{path}: the member {member.name!r:.120} comes twice. The bundle was not written by kohaku-delta."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb") as file, tar.extractfile(member) as source:
            while piece := source.read(hashing.PIECE):
                file.write(piece)
        if target.stat().st_size != member.size:
            raise UserError(f"{path} is cut short in {member.name}. Fetch it again.")


def pack_bundle(folder: Path, out) -> None:
    """Writes the files of a folder into an open tar's file."""
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(
            (each for each in folder.rglob("*") if each.is_file()), key=lambda each: each.relative_to(folder).as_posix()
        ):
            member = tarfile.TarInfo(path.relative_to(folder).as_posix())
            member.size, member.mode, member.mtime = path.stat().st_size, 0o644, 0
            with open(path, "rb") as file:
                tar.addfile(member, file)


def bundle_manifest(folder: Path, left_out: dict[str, int]) -> None:
    """Writes the bundle.json of a folder that holds everything else."""
    files = {
        path.relative_to(folder).as_posix(): hashing.digest_path(path, md5=False).sha256
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(folder / MANIFEST, {"format": "kohaku-delta bundle 1", "files": files, "left_out": left_out})


def write_json(path: Path, content) -> None:
    path.write_text(
        json.dumps(content, indent=1, sort_keys=True, default=BaseModel.model_dump) + "\n", encoding="utf-8"
    )
