"""Virtual environments for the tools we compare with: made once; if one cannot be installed, its figures are left out
and a message says why.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

import click


def ensure_venv(folder: Path, name: str, packages: tuple[str, ...], borrowing: bool = False) -> Path | None:
    """The Python that has `packages`, and with `borrowing` what this environment has (torch) instead of what they ask
    for. None, where they cannot be had.
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
