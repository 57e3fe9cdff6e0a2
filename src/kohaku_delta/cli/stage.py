"""kohaku-delta stage: the one command in dvc.yaml for every recipe, so that DVC can freeze, move and remove stages."""

import os
import sys
from pathlib import Path

import click

from kohaku_delta import params as recipes
from kohaku_delta.errors import UserError

# options after NAME are the script's, --help too
CONTEXT = {"allow_interspersed_args": False, "help_option_names": ["-h", "--help"]}


@click.command(context_settings=CONTEXT)
@click.argument("name")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def stage(name: str, options: tuple[str, ...]) -> None:
    """Run stages/NAME.py of the recipe in this folder (from its `root`), with that script's OPTIONS."""
    folder = Path(recipes.load("params.yaml").root) / "stages"
    script = folder / f"{name}.py"
    if not script.is_file():
        names = ", ".join(sorted(path.stem for path in folder.glob("*.py")))
        remedy = f"The stages are {names}." if names else f"Check `root` in params.yaml: {folder} has no stages."
        raise UserError(f"{script} does not exist. {remedy}")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(script), *options])
