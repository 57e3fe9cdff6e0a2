"""Invariant: code is judged by what a commit holds, never by what a commit is called; git is asked only for objects
that are here.
"""

import os
import subprocess
from pathlib import Path


def committed_files(root: Path, commit: str, places: list[str]) -> dict[str, bytes] | None:
    """place → the file that the commit has there (places it lacks are left out). None without git, or if the commit is
    not here.
    """
    asked = "".join(f"{commit}:{place}\n" for place in places)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {
        "GIT_NO_LAZY_FETCH": "1"
    }
    try:
        subprocess.run(
            ["git", "-C", str(root), "cat-file", "-e", f"{commit}^{{commit}}"],
            capture_output=True,
            check=True,
            env=environment,
        )
        said = subprocess.run(
            ["git", "-C", str(root), "cat-file", "--batch"],
            input=asked.encode(),
            capture_output=True,
            check=True,
            env=environment,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found, at = {}, 0
    for place in places:
        line, _, _ = said[at:].partition(b"\n")
        at += len(line) + 1
        words = line.split()
        if len(words) == 3 and words[1] == b"blob":
            size = int(words[2])
            found[place] = said[at : at + size]
            at += size + 1
    return found
