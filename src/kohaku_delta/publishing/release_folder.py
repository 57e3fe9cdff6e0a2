"""The folder `release/` beside a finished build, laid out as the published repository was.

Every file is an output that dvc.lock records, hashed against it first, or is written here from the recipe and such
outputs: the card, the settings for other programs, the bill of materials, the description of the dataset. Weights are
not stored twice: files are hard links to the outputs, and copies only if the file system allows no links. The folder
appears as a whole or not at all. It is not an output of any stage, and nothing in it comes from the clock, the host or
the network. Only the two signatures, which are there if a key was given, vary from signing to signing.
"""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kohaku_delta import atomic_files, paths
from kohaku_delta.errors import UserError, first_lines
from kohaku_delta.formats import hashing
from kohaku_delta.params import Release
from kohaku_delta.printing import printable
from kohaku_delta.provenance import bundles, folder_signature, signature, statement, target_paths
from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.publishing import bill_of_materials, dataset_description, kohya_settings
from kohaku_delta.report import build_summary, model_card
from kohaku_delta.report.build_summary import Build
from kohaku_delta.units import format_size
from kohaku_delta.verify import check_lock, check_lock_records
from kohaku_delta.verify.findings import PASS, Finding

FOLDER = "release"
CARD = "README.md"  # the name that Hugging Face reads
BOM, DATASET = "bom.json", "croissant.json"  # the names that their tools look for
SAMPLES = "samples/"
MAX_DEPTH = 16  # folders in folders
SIGNATURES = (bundles.PROVENANCE, folder_signature.FILE)  # these, and no other file, differ between two releases
CHECKS = (check_lock.check_pipeline, check_lock.check_parameters, check_lock.check_links, check_lock.check_outputs)
NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}  # hard links are impossible here


@dataclass(frozen=True)
class SourceFile:
    """A file of the folder and the output that it is."""

    name: str  # in the folder
    path: Path
    bytes: int
    sha256: str


def write_release(rebuild: Artifact, say: Callable[[str], object], key: Path | None = None) -> dict[str, int]:
    """Writes `release/` in the recipe's folder; returns the bytes of its files by name. say: takes a sentence on what
    is copied, before it is; key: the private key (PEM) that signs the provenance. Raises UserError for a build that is
    not finished or not as its dvc.lock says, and for a folder with files that are not of this release.
    """
    if rebuild.bundle:
        raise UserError(f"{rebuild.name} is a bundle, which has no weights. Name a recipe's folder with its build.")
    if key:
        folder_signature.check_private_key(key)
    times = {path: path.stat().st_mtime_ns for path in (rebuild.folder / paths.BUILD).rglob("*") if path.is_file()}
    require_locked(rebuild, (*CHECKS, check_lock_records.check_records) if key else CHECKS)
    sources, texts = layout(rebuild)
    names = [source.name for source in sources] + [*texts, *SIGNATURES]
    if doubled := sorted({name for name in names if _collides(name, names)}):
        raise UserError(
            f"Two files of the release would have one name, or one would be a folder of the other: "
            f"{', '.join(doubled)}. Correct the section release of params.yaml."
        )
    folder = rebuild.folder / FOLDER
    old_signatures = [name for name in SIGNATURES if (folder / name).exists()]
    _refuse_other_files(folder, set(names))
    with atomic_files.atomic_dir(folder) as aside:
        if unlinked := [source for source in sources if not _link(source, aside / source.name)]:
            _copy(unlinked, aside, say)
        for source in sources:
            if source.path.stat().st_mtime_ns != times.get(source.path):
                raise UserError(f"{source.path} was changed while the release was made. Make it again.")
        for name, text in texts.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_text(text, encoding="utf-8", newline="\n")
        if key:
            signature.sign(statement.build_statement(rebuild), key, aside / bundles.PROVENANCE)
    if old_signatures and not key:
        say(f"The folder was signed, and is no longer ({', '.join(old_signatures)}): `make proofs` signs it again.")
    return {name: (folder / name).stat().st_size for name in sorted(names) if (folder / name).exists()}


def layout(rebuild: Artifact) -> tuple[list[SourceFile], dict[str, str]]:
    """All files but the signatures: the outputs that are published, and the texts that are written here, by name."""
    sources, build = _sources(rebuild), build_summary.read_build(rebuild.folder)
    texts = _texts(rebuild, build)
    return sources, texts | {BOM: bill_of_materials.bom(rebuild, build, _hashes(sources, texts))}


def expected_files(rebuild: Artifact) -> dict[str, str]:
    """Name → sha256 of all files but the signatures, of a build that `require_locked` accepts."""
    return _hashes(*layout(rebuild))


def _hashes(sources: list[SourceFile], texts: dict[str, str]) -> dict[str, str]:
    written = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    return {source.name: source.sha256 for source in sources} | written


def list_files(folder: Path) -> dict[str, int]:
    """Name → bytes of every file in a folder, perhaps a stranger's, by name. Raises UserError for a link, a special
    file, a name that is not UTF-8, and for more or deeper folders than a release has.
    """
    files: dict[str, int] = {}

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be looked at: {error.strerror}.")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        for path in (Path(parent, entry) for entry in folders + names):
            name = path.relative_to(folder).as_posix()
            if any("\ud800" <= letter <= "\udfff" for letter in name) or name.count("/") > MAX_DEPTH:
                raise UserError(f"{name:.200} is not a name that a release has.")
            mode, size = (found := path.lstat()).st_mode, found.st_size
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise UserError(f"{name} is a link or a special file. Only plain files are published.")
            if stat.S_ISREG(mode):
                files[name] = size
        if len(files) > target_paths.MAX_FILES:
            raise UserError(f"{folder} holds more than {target_paths.MAX_FILES:,} files, which no release has.")
    return dict(sorted(files.items()))


def require_locked(rebuild: Artifact, checks: tuple[Callable[..., Finding], ...]) -> None:
    """Raises UserError unless the whole pipeline ran, and every output is the one in dvc.lock."""
    faults = [
        f"{finding.group}/{finding.name}: {printable(finding.message)}"
        for finding in (check(rebuild) for check in checks)
        if finding.status != PASS
    ]
    if faults:
        raise UserError(
            f"{rebuild.name} is not the finished build that its dvc.lock describes:",
            *first_lines(faults),
            "Nothing was written. `dvc status` says what differs and would run again; `dvc checkout` brings back an "
            "output that was edited.",
        )


def _sources(rebuild: Artifact) -> list[SourceFile]:
    """The outputs that are published, by their names in the folder."""
    names = rebuild.recipe.release
    milestones = {
        paths.milestone_name(step): milestone_file(names, step)
        for step in map(_milestone_step, rebuild.digests[paths.MILESTONES].files or {})
    }
    sources = [_source(rebuild, out, None, name) for out, name in single_files(names).items()]
    for out, place in ((paths.MILESTONES, milestones), (paths.DIFFUSERS, {}), (paths.SAMPLES, {})):
        for file in rebuild.digests[out].files or {}:
            name = f"{SAMPLES}{file}" if out == paths.SAMPLES else place.get(file, file)
            sources.append(_source(rebuild, out, file, name))
    return sources


def single_files(names: Release) -> dict[str, str]:
    """Output → name in the folder, of the outputs that are one file."""
    return {
        paths.FINAL: names.final,
        paths.BASE: names.base,
        paths.LOKR: names.lokr,
        paths.ARTISTS: names.artists,
        paths.CHARACTERS: names.characters,
        paths.BUCKETS: names.buckets,
        paths.PREVIEW: "preview.png",
        paths.MILESTONES_PNG: "milestones.png",
    }


def milestone_file(names: Release, step: int) -> str:
    """The name of the LoKr after `step` steps."""
    lokr = PurePosixPath(names.lokr)
    return str(lokr.with_name(f"{lokr.stem}-step{step:08d}{lokr.suffix}"))


def _milestone_step(file: str) -> int:
    digits = file.removeprefix("delta-lokr-step").removesuffix(".safetensors")
    if not digits.isdecimal() or paths.milestone_name(int(digits)) != file:
        raise UserError(f"{paths.MILESTONES}/{printable(file)} is not a milestone of the train stage. Move it away.")
    return int(digits)


def _source(rebuild: Artifact, out: str, file: str | None, name: str) -> SourceFile:
    digest, path = rebuild.digests[out], rebuild.folder / out
    if file is None:
        return SourceFile(name, path, digest.bytes, digest.sha256)
    return SourceFile(name, path / file, (path / file).stat().st_size, (digest.files or {})[file])


def _texts(rebuild: Artifact, build: Build) -> dict[str, str]:
    """The files that are written here: name → text."""
    names = rebuild.recipe.release
    return {
        CARD: model_card.render_card(build, card_files(names)),
        DATASET: dataset_description.croissant(rebuild, build),
        names.training: kohya_settings.training_toml(rebuild.recipe),
        names.preset: kohya_settings.preset_toml(rebuild.recipe.lokr.preset),
    }


def card_files(names: Release) -> dict[str, str]:
    """The names that the card of the folder uses; the parts of the diffusers folder lie beside it."""
    own = names.model_dump(include={"final", "base", "lokr", "artists", "characters"})
    return own | {"pipeline": ".", "bom": BOM}


def _collides(name: str, names: list[str]) -> bool:
    return names.count(name) > 1 or any(str(above) in names for above in PurePosixPath(name).parents)


def _refuse_other_files(folder: Path, names: set[str]) -> None:
    """The folder is replaced as a whole, and what a user put into it, or signed, must not vanish."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
    if other := sorted(found - names):
        raise UserError(
            f"{folder} holds files that are not of this release:",
            *first_lines(other),
            f"Move them away, or delete {folder}: its large files are links, and {paths.BUILD}/ keeps them.",
        )


def _link(source: SourceFile, target: Path) -> bool:
    """Whether a hard link could be made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.path.resolve(), target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return False
    return True


def _copy(sources: list[SourceFile], folder: Path, say: Callable[[str], object]) -> None:
    total, free = sum(source.bytes for source in sources), shutil.disk_usage(folder).free
    if total > free:
        raise UserError(
            f"{len(sources)} files ({format_size(total)}) cannot be hard links here and have to be copied, and only "
            f"{format_size(free)} are free. Put build/ and DVC's cache on one file system, or free some space."
        )
    say(f"{len(sources)} files ({format_size(total)}) are copied, because no hard link to them is possible here")
    for source in sources:
        shutil.copyfile(source.path, folder / source.name)
        if hashing.hash_file(folder / source.name) != source.sha256:
            raise UserError(f"{source.path} was changed, or wrongly copied, while the release was made. Make it again.")
