"""kohaku-delta bundle: what a stranger needs to audit a rebuild, without its weights."""

import shutil
import tempfile
from pathlib import Path

import click

from kohaku_delta import atomic_files
from kohaku_delta.cli.stage_command import StageCommand
from kohaku_delta.errors import UserError
from kohaku_delta.formats import hashing
from kohaku_delta.provenance import bundles, dvc_yaml, signature, stage_record
from kohaku_delta.provenance import statement as statements
from kohaku_delta.provenance.artifact import Artifact, is_library_locks, open_artifact

FILE = click.Path(path_type=Path)
SMALL = 16 << 20  # bytes of an out that is no table


@click.command("bundle", cls=StageCommand)
@click.argument("out", type=FILE)
@click.option(
    "--recipe",
    "folder",
    type=FILE,
    default=".",
    show_default=True,
    help="The recipe's folder (params.yaml, dvc.lock, build/).",
)
@click.option(
    "--key",
    type=FILE,
    help="Sign its provenance with this private key (PEM); without, a provenance.json that lies there is taken along.",
)
def command(out: Path, folder: Path, key: Path | None) -> None:
    """Write OUT.tar, or the folder OUT: locks, parameters, records, provenance, journal, schedule, tables and small
    outs; of weights the digest of each tensor.

    The bytes depend on those of the rebuild only.
    """
    with open_artifact(folder) as found, tempfile.TemporaryDirectory(prefix="kohaku-delta-") as temporary:
        if found.bundle:
            raise UserError(f"{folder} is a bundle already.")
        gathered = Path(temporary) / "bundle"
        gathered.mkdir()
        left_out = _bundle(found, gathered)
        if key:
            signature.sign(statements.build_statement(found), key, gathered / bundles.PROVENANCE)
        elif (found.folder / bundles.PROVENANCE).is_file():
            shutil.copyfile(found.folder / bundles.PROVENANCE, gathered / bundles.PROVENANCE)
        bundles.write_manifest(gathered, left_out)
        if out.suffix == ".tar":
            with atomic_files.atomic_write(out) as file:
                bundles.pack_bundle(gathered, file)
        else:
            with atomic_files.atomic_dir(out) as aside:
                shutil.copytree(gathered, aside, dirs_exist_ok=True)
        files = [path for path in gathered.rglob("*") if path.is_file()]
    click.echo(f"{len(files)} files, {sum(left_out.values()):,} bytes of weights left out → {out}")


def _bundle(found: Artifact, to: Path) -> dict[str, int]:
    """Copies what a bundle holds; returns the bytes of each out that it does not."""

    def take(place: str, name: str | None = None) -> None:
        target = to / (name or place)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found.folder / place, target)

    for place in (
        dvc_yaml.PIPELINE,
        dvc_yaml.LOCK,
        dvc_yaml.PARAMS,
        *(path.name for path in found.folder.glob("pins-*.csv")),
    ):
        take(place)
    libraries = next((dep for stage in found.stages.values() for dep in stage.deps if is_library_locks(dep)), None)
    if libraries and (found.folder / libraries).is_dir():
        for name in hashing.digest_path(found.folder / libraries, md5=False).files or {}:
            take(f"{libraries}/{name}", f"{bundles.LIBRARIES}/{name}")
    for name in found.records:
        take(f"{stage_record.FOLDER}/{stage_record.record_filename(name, found.lock[name].key())}")
    left_out = {}
    for out, digest in found.digests.items():
        places = [out] if digest.files is None else [f"{out}/{place}" for place in digest.files]
        if any(
            place.endswith(bundles.WEIGHTS)
            or (not place.endswith(".parquet") and (found.folder / place).stat().st_size > SMALL)
            for place in places
        ):
            left_out[out] = digest.bytes
        else:
            for place in places:
                take(place)
    bundles.write_json(to / bundles.TENSORS, found.tensors)
    return left_out
