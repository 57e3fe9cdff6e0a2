"""kohaku-delta release: the files that a rebuild publishes, as one folder."""

from pathlib import Path

import click

from kohaku_delta.cli.stage_command import FILE, StageCommand
from kohaku_delta.printing import print_line
from kohaku_delta.provenance.artifact import open_artifact
from kohaku_delta.publishing import release_folder
from kohaku_delta.units import format_size


@click.command(cls=StageCommand)
@click.argument("folder", type=FILE, default=".")
@click.option(
    "--key", type=FILE, help="Sign the provenance with this private key (PEM, elliptic curve). See `make proofs`."
)
def release(folder: Path, key: Path | None) -> None:
    """Lay out release/ in FOLDER, a recipe's folder with a finished build, as the published repository was.

    Outputs are hashed against dvc.lock first, and linked. Nothing is sent; `kohaku-delta upload` does that. With --key
    the folder also holds provenance.json; `make proofs` also signs the folder as a whole.
    """
    with open_artifact(folder) as rebuild:
        files = release_folder.write_release(rebuild, print_line, key)
        place = rebuild.folder / release_folder.FOLDER
    for name, size in files.items():
        print_line(f"{size:>15,}  {name}")
    print_line(f"{place}: {len(files)} files, {format_size(sum(files.values()))}")
