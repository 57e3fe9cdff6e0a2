"""The last line of `make repro`: the final model, its sha256, and whether dvc.lock is still the committed one. `python
miniature/verdict.py` runs anywhere.
"""

import hashlib
import subprocess
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
MODEL = FOLDER / "build" / "kohaku-xl-delta.safetensors"


def lock() -> str:
    """What git says of dvc.lock against the committed one."""
    committed = (
        subprocess.run(["git", "cat-file", "-e", "HEAD:./dvc.lock"], cwd=FOLDER, capture_output=True).returncode == 0
    )
    if not committed:
        return "not compared: no committed one is at hand"
    moved = subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", "dvc.lock"], cwd=FOLDER, capture_output=True
    ).returncode
    return (
        "CHANGED: `git diff miniature/dvc.lock` shows the first stage that differs"
        if moved
        else "unchanged: the same model, bit for bit"
    )


def verdict() -> str:
    """One line."""
    sha256 = hashlib.sha256(MODEL.read_bytes()).hexdigest()
    return f"{MODEL.relative_to(FOLDER.parent)}  sha256 {sha256}  miniature/dvc.lock {lock()}"


if __name__ == "__main__":
    print(verdict())
