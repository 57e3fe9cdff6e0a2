"""README, CONTRIBUTING and docs/ name only what exists, and show what the committed lock says."""

import ast
import hashlib
import re
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
page_by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_readme_shows_the_locked_preview_and_the_locked_model():
    stages = YAML(typ="safe", pure=True).load((ROOT / "miniature" / "dvc.lock").read_text())["stages"]
    locked = {out["path"]: out["md5"] for out in stages["preview"]["outs"]}
    assert hashlib.md5((ROOT / "docs" / "preview.png").read_bytes()).hexdigest() == locked["build/preview.png"], (
        "copy miniature/build/preview.png to docs/"
    )
    if (model := ROOT / "miniature" / "build" / "kohaku-xl-delta.safetensors").is_file():
        readme = (ROOT / "README.md").read_text()
        assert set(re.findall(r"\b[0-9a-f]{64}\b", readme)) == {hashlib.sha256(model.read_bytes()).hexdigest()}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


@page_by_page
def test_every_file_make_target_and_link_that_a_page_names_exists(page):
    makefile, text = (ROOT / "Makefile").read_text(), page.read_text()
    recipe = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
    released = {*recipe["release"].values(), "miniature/release"}  # `make release` writes them
    for target in re.findall(r"\bmake ([a-z][a-z-]+)\b(?! [a-z])", text):
        assert re.search(rf"^([a-z-]+ )*{target}( [a-z-]+)*:", makefile, re.M), f"make {target}"
    for name in re.findall(r"\b((?:stages|miniature|docs|requirements|src|tests|container)/[\w./-]*\w)", text):
        assert (ROOT / name).exists() or "/build" in name or name in released, name
    for name in re.findall(r"\btest_\w+\.py", text):
        assert list((ROOT / "tests").rglob(name)), name
    for name, _, heading in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text) if ":" not in link):
        target = page.parent / name if name else page
        assert target.exists(), name
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.M) if heading else []
        assert heading in ["", *(re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings)], heading


@page_by_page
def test_every_function_and_class_that_a_page_names_exists(page):
    for path, name in re.findall(r"`((?:\w+/)*\w+\.py):(\w+)`", page.read_text()):
        tree = ast.parse((ROOT / "src" / "kohaku_delta" / path).read_text())
        assert name in {node.name for node in tree.body if hasattr(node, "name")}, f"{path}:{name}"


def test_every_page_that_the_code_names_exists():
    files = subprocess.run(
        ["git", "grep", "-IhoE", r"docs/[a-z-]+\.md", "--", "src", "stages", "tests", "tools", "*.yaml", "Dockerfile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert not [name for name in set(files.stdout.split()) if not (ROOT / name).is_file()]
