"""kohaku-delta bundle: everything needed to audit a rebuild, without its weights."""

import shutil
import tempfile
from pathlib import Path

import click

from kohaku_delta import atomic_files, paths
from kohaku_delta.cli.stage_command import FILE, StageCommand
from kohaku_delta.errors import UserError
from kohaku_delta.formats import hashing
from kohaku_delta.printing import print_line
from kohaku_delta.provenance import bundles, dvc_yaml, signature, stage_record, statement
from kohaku_delta.provenance.artifact import Artifact, is_library_locks, open_artifact

ARCHIVES = (".gz", ".tgz", ".xz", ".bz2", ".zst", ".zip")


@click.command(cls=StageCommand)
@click.argument("out", type=FILE)
@click.option("--recipe", "folder", type=FILE, default=".", help="The recipe's folder (params.yaml, dvc.lock, build/).")
@click.option(
    "--key",
    type=FILE,
    help="Sign the provenance with this private key (PEM). Without it, an existing provenance.json is included.",
)
def bundle(out: Path, folder: Path, key: Path | None) -> None:
    """Write OUT.tar, or the folder OUT: locks, parameters, records, provenance, journal, schedule, tables and small
    outputs; of weights only the digest of each tensor.

    The bytes depend only on those of the rebuild.
    """
    if out.suffix in ARCHIVES:
        raise UserError(f"{out}: a bundle is a file .tar, or a folder. Compress the .tar afterwards.")
    own = set()
    if out.suffix != ".tar":
        if (out / bundles.MANIFEST).is_file():
            own = {bundles.MANIFEST, *bundles.read_manifest(out).files}
        atomic_files.refuse_other_files(out, own.__contains__)
    if key and not key.is_fifo():  # what comes through a pipe can be read once
        signature.read_private_key(key)
    with open_artifact(folder) as rebuild, tempfile.TemporaryDirectory(prefix="kohaku-delta-") as temporary:
        if rebuild.bundle:
            raise UserError(f"{folder} is a bundle already.")
        gathered = Path(temporary) / "bundle"
        gathered.mkdir()
        left_out = _gather(rebuild, gathered)
        missing = [out for out in rebuild.writers if out not in rebuild.digests]
        if not (gathered / bundles.LIBRARIES).is_dir():
            missing.append("the lock files of the libraries")
        if missing:
            print_line(f"not in {folder}, and so not in the bundle: {', '.join(missing)}", err=True)
        provenance = rebuild.folder / bundles.PROVENANCE
        if key:
            signature.sign(statement.build_statement(rebuild), key, gathered / bundles.PROVENANCE)
        elif provenance.is_file():
            shutil.copyfile(provenance, gathered / bundles.PROVENANCE)
        bundles.write_manifest(gathered, left_out)
        if out.suffix == ".tar":
            with atomic_files.atomic_write(out) as file:
                bundles.pack_bundle(gathered, file)
        else:
            with atomic_files.atomic_dir(out, own.__contains__) as target:
                shutil.copytree(gathered, target, dirs_exist_ok=True)
        count = sum(path.is_file() for path in gathered.rglob("*"))
    print_line(f"{count} files, {sum(left_out.values()):,} bytes of weights left out → {out}")


def _gather(rebuild: Artifact, to: Path) -> dict[str, int]:
    """Copies what a bundle contains; returns the bytes of each output that it leaves out."""

    def copy(path: str, name: str | None = None) -> None:
        target = to / (name or path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(rebuild.folder / path, target)

    pin_lists = [path.name for path in rebuild.folder.glob("pins-*.csv")]
    for path in (dvc_yaml.PIPELINE, dvc_yaml.LOCK, dvc_yaml.PARAMS, *pin_lists):
        copy(path)
    libraries = next((dep for stage in rebuild.stages.values() for dep in stage.deps if is_library_locks(dep)), None)
    if libraries and (rebuild.folder / libraries).is_dir():
        for name in hashing.digest_path(rebuild.folder / libraries, md5=False).files or {}:
            copy(f"{libraries}/{name}", f"{bundles.LIBRARIES}/{name}")
    for name in rebuild.records:
        copy(f"{paths.RECORDS}/{stage_record.record_filename(name, rebuild.lock[name].key())}")
    left_out = {}
    for out, digest in rebuild.digests.items():
        files = [out] if digest.files is None else [f"{out}/{name}" for name in digest.files]
        if not files or any(
            _is_left_out(rebuild.folder / path) for path in files
        ):  # a tar of files has no empty folder
            left_out[out] = digest.bytes
        else:
            for path in files:
                copy(path)
    bundles.write_json(to / bundles.TENSORS, rebuild.tensors)
    return left_out


def _is_left_out(path: Path) -> bool:
    if path.name.endswith(bundles.WEIGHTS):
        return True
    return path.suffix != ".parquet" and path.stat().st_size > bundles.MAX_OUTPUT
