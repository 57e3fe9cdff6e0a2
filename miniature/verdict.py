"""The last line of `make repro`: the final model, its sha256, and whether dvc.lock still has the committed hashes: of
all files, or of all outputs and not of the code.
"""

import hashlib
import subprocess
from pathlib import Path

from ruamel.yaml import YAML

FOLDER = Path(__file__).resolve().parent
MODEL = FOLDER / "build" / "kohaku-xl-delta.safetensors"
CODE = "build/code/"  # descriptions of the code: outputs of the stage `code` that follow its text


def outputs(lock: str) -> dict[str, str]:
    """The md5 of each output in a dvc.lock, by `stage: path`, in the order of the stages; without those of `code`."""
    stages = YAML(typ="safe", pure=True).load(lock)["stages"]
    return {
        f"{name}: {out['path']}": out["md5"]
        for name, stage in stages.items()
        for out in stage.get("outs", [])
        if not out["path"].startswith(CODE)
    }


def compare(committed: str, current: str) -> str:
    """What the text of the current dvc.lock says against that of the committed one."""
    if committed == current:
        return "unchanged: the same model, bit for bit"
    before, now = outputs(committed), outputs(current)
    differing = [name for name in before | now if before.get(name) != now.get(name)]
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        return f"CHANGED: other outputs than committed ({differing[0]}{more}); see `git diff miniature/dvc.lock`"
    return "changed in its code or parameters; every output is unchanged: the same model, bit for bit"


def verdict() -> str:
    """One line."""
    sha256 = hashlib.sha256(MODEL.read_bytes()).hexdigest()
    shown = subprocess.run(["git", "show", "HEAD:./dvc.lock"], cwd=FOLDER, capture_output=True)
    lock = (
        "not compared: no committed one is at hand"
        if shown.returncode
        else compare(shown.stdout.decode(), (FOLDER / "dvc.lock").read_text(encoding="utf-8"))
    )
    return f"{MODEL.relative_to(FOLDER.parent)}  sha256 {sha256}  miniature/dvc.lock {lock}"


if __name__ == "__main__":
    print(verdict())
