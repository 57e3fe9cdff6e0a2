"""code: what each stage may run. Reads src/, stages/ and the lock of the libraries; writes build/code/<stage>.json, on
which the other stages depend.
"""

import os
import sys

sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")

from pathlib import Path

import click

from kohaku_delta import atomic_files
from kohaku_delta import params as recipes
from kohaku_delta.cli.stage_command import StageCommand, print_summary
from kohaku_delta.provenance import import_closure

FILE = click.Path(path_type=Path)


@click.command(cls=StageCommand)
@click.option("--params", type=FILE, default="params.yaml", show_default=True, help="The recipe.")
@click.option(
    "--lock",
    type=FILE,
    help="The lock of the libraries.  [default: requirements/ of the repository, as the recipe says]",
)
@click.option(
    "--out", type=FILE, default=import_closure.FOLDER, show_default=True, help="The folder of the descriptions."
)
def main(params: Path, lock: Path | None, out: Path) -> None:
    """Describe the code of every stage: files by their syntax trees, libraries as locked."""
    stages = Path(__file__).resolve().parent
    lock = lock or stages.parent / "requirements" / f"{recipes.load(params).requirements}.txt"
    every = [
        import_closure.describe_stage(script, lock)
        for script in sorted(stages.glob("*.py"))
        if script != Path(__file__).resolve()
    ]
    for each in every:
        with atomic_files.atomic_write(out / f"{each.stage}.json", "w") as file:
            file.write(import_closure.dumps(each))
    files, libraries = ({name for each in every for name in getattr(each, part)} for part in ("files", "libraries"))
    print_summary("code", f"{len(every)} stages, {len(files)} files, {len(libraries)} libraries → {out}")


if __name__ == "__main__":
    main()
