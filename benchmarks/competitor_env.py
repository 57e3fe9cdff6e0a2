"""An environment per competitor, made once. If it cannot be installed, a message says that its figures are left out."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import click


def ensure_venv(folder: Path, name: str, packages: tuple[str, ...], borrowing: bool = False) -> Path | None:
    """The Python that has `packages`; with `borrowing`, this environment's packages (torch) replace their dependencies.
    None if they cannot be installed.
    """
    python = folder / "bin" / "python"
    if (folder / "done").is_file():
        return python
    click.echo(f"making an environment for {name} in {folder} …")
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        if borrowing:
            place = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
            (place / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        alone = ["--no-deps"] if borrowing else []
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *alone, *packages], check=True
        )
    except (subprocess.CalledProcessError, OSError) as error:
        click.echo(f"{name} cannot be installed here ({error}): its figures are left out.", err=True)
        return None
    (folder / "done").touch()
    return python
