"""What the README shows is what the committed lock says."""

import hashlib
import re
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]


def test_the_picture_in_the_readme_is_the_locked_preview():
    stages = YAML(typ="safe", pure=True).load((ROOT / "miniature" / "dvc.lock").read_text())["stages"]
    locked = {out["path"]: out["md5"] for out in stages["preview"]["outs"]}
    assert hashlib.md5((ROOT / "docs" / "preview.png").read_bytes()).hexdigest() == locked["build/preview.png"], (
        "copy miniature/build/preview.png to docs/"
    )


def test_every_file_and_make_target_that_the_pages_name_exists():
    makefile = (ROOT / "Makefile").read_text()
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        for target in re.findall(r"\bmake ([a-z][a-z-]+)", text):
            assert re.search(rf"^{target}:", makefile, re.M), f"{page.name}: make {target}"
        for name in re.findall(r"\b((?:stages|miniature|docs|requirements|src)/[\w./-]*\w)", text):
            assert (ROOT / name).exists() or "/build" in name, f"{page.name}: {name}"
