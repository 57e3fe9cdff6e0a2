"""kohaku-delta stage: what dvc.yaml runs. One command for every recipe, wherever its folder lies: so that DVC can
freeze, move and remove stages.
"""

import os
import sys
from pathlib import Path

import click

from kohaku_delta import params as recipes
from kohaku_delta.errors import UserError


@click.command("stage", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("name")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def stage(name: str, options: tuple[str, ...]) -> None:
    """Run stages/NAME.py of the recipe in this folder (its `root`), with OPTIONS of that script."""
    scripts = Path(recipes.load("params.yaml").root) / "stages"
    script = scripts / f"{name}.py"
    if not script.is_file():
        there = ", ".join(sorted(path.stem for path in scripts.glob("*.py")))
        raise UserError(
            f"{script} is not there. "
            + (f"The stages are {there}." if there else f"Check `root` in params.yaml: {scripts} has no stages.")
        )
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(script), *options])
