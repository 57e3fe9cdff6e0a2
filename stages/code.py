"""code: describes the code of every stage. Reads src/, stages/ and the lock of the libraries; writes
build/code/<stage>.json, on which the other stages depend.
"""

import os
import sys

sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")

from pathlib import Path

import click

from kohaku_delta import atomic_files, paths
from kohaku_delta import params as recipes
from kohaku_delta.cli.stage_command import FILE, StageCommand, print_summary
from kohaku_delta.provenance import import_closure


@click.command(cls=StageCommand)
@click.option("--params", type=FILE, default="params.yaml", help="The recipe.")
@click.option("--lock", type=FILE, help="The lock of the libraries.  [default: the recipe's, in requirements/]")
@click.option("--out", type=FILE, default=paths.CODE, help="The folder of the descriptions.")
def main(params: Path, lock: Path | None, out: Path) -> None:
    """Describe the code of every stage: files by their syntax trees, libraries as locked."""
    this = Path(__file__).resolve()
    lock = lock or this.parents[1] / "requirements" / f"{recipes.load(params).requirements}.txt"
    stages = [
        import_closure.describe_stage(script, lock) for script in sorted(this.parent.glob("*.py")) if script != this
    ]
    for stage in stages:
        with atomic_files.atomic_write(out / f"{stage.stage}.json", "w") as file:
            file.write(import_closure.dumps(stage))
    files = {name for stage in stages for name in stage.files}
    libraries = {name for stage in stages for name in stage.libraries}
    print_summary("code", f"{len(stages)} stages, {len(files)} files, {len(libraries)} libraries → {out}")


if __name__ == "__main__":
    main()
