"""docs/recipe.md explains every key of params.yaml and no other, with its value; docs/fidelity.md names values that are
those of the recipe.
"""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from kohaku_delta.params import load

ROOT = Path(__file__).resolve().parents[2]
yaml = YAML(typ="safe", pure=True)
RECIPE = yaml.load(ROOT / "params.yaml")
WHOLE = {
    "caption.years",
    "caption.ratings",
    "caption.quality_above",
    "merge.weights",
    "lokr.preset.modules",
    "lokr.preset.names",
    "published.milestones",
}  # mappings of names
OPTIONAL = {
    f"download.inputs.{name}" for name in ("network_weights", "posts", "references")
}  # keys that the release does without
SOURCES = {"ours", "card", "docs", "files", "tool", "trainer", "preset", "SDXL"}


def keys(content, path="") -> dict:
    """Every key of a recipe: its path → its value. Pins and ranges have their own keys once for all of them."""
    if path == "download.inputs":
        fields = {field for pin in content.values() for field in (pin[0] if isinstance(pin, list) else pin)}
        return {f"{path}.{name}": None for name in content} | {f"{path}.*.{field}": None for field in fields}
    if isinstance(content, dict) and path not in WHOLE:
        return {
            each: value
            for key, inside in content.items()
            for each, value in keys(inside, f"{path}.{key}".lstrip(".")).items()
        }
    fields = (
        {f"{path}[].{field}": None for field in content[0]}
        if isinstance(content, list) and content and isinstance(content[0], dict)
        else {}
    )
    return {path: content} | fields


def rows(name) -> list[list[str]]:
    """The cells of every row of every table of a document."""
    lines = (ROOT / "docs" / name).read_text().splitlines()
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if line.startswith("|") and not line.startswith("|---")
    ]


EXPLAINED = [row for row in rows("recipe.md") if len(row) == 4 and row[0] != "key"]


@pytest.mark.parametrize(
    "recipe", ["params.yaml", "miniature/params.yaml", "pilot/params.yaml", "recipes/epsilon-rev1/params.yaml"]
)
def test_every_key_is_explained_once_and_none_that_does_not_exist(recipe):
    named = [row[0].strip("`") for row in EXPLAINED]
    there = keys(yaml.load(ROOT / recipe)).keys() - {"published"}
    if recipe == "params.yaml":
        assert sorted(named) == sorted({*there, *OPTIONAL})
    else:  # which has no published figures, no published base, and the same keys for the rest
        assert there <= set(named)


@pytest.mark.parametrize("row", EXPLAINED, ids=lambda row: row[0])
def test_a_key_is_explained_with_the_releases_value_and_a_source(row):
    key, value, source, meaning = row
    assert source in SOURCES and len(meaning) > 3
    assert (value == "absent") == (key.strip("`") in OPTIONAL)
    if value == "absent":
        return
    actual = keys(RECIPE)[key.strip("`")]
    if value == "…":
        assert actual is None or isinstance(actual, (list, dict)), "short enough to be written"
    else:
        assert yaml.load(value.strip("`").replace("\\|", "|")) == actual


def test_what_the_recipe_calls_a_quirk_is_marked_as_one():
    section, quirks = "", set()
    for line in (ROOT / "params.yaml").read_text().splitlines():
        if match := re.match(r"(\w+):", line):
            section = match[1]
        elif match := re.match(r"  (\w+):.*# quirk", line):
            quirks.add(f"{section}.{match[1]}")
    marked = {row[0].strip("`") for row in EXPLAINED if row[3].startswith("**Q**")}
    assert quirks and marked == quirks
    assert quirks <= {row[2].strip("`").split(":")[0] for row in rows("fidelity.md") if len(row) == 3}, (
        "docs/fidelity.md has no line for it"
    )


def test_fidelity_names_keys_with_the_values_that_the_recipe_has():
    named = re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)(?:: ([^`]+))?`", (ROOT / "docs" / "fidelity.md").read_text())
    parameters = [
        (key, value) for key, value in named if key.split(".")[0] in RECIPE and not key.endswith((".py", ".yaml"))
    ]
    known = keys(RECIPE)
    assert {key for key, _ in parameters} <= known.keys()
    with_values = [
        (key, value) for key, value in parameters if value and key != "merge.start"
    ]  # of which the other choice is named
    assert len(with_values) >= 7
    for key, value in with_values:
        assert yaml.load(value) == known[key], key


def test_the_values_that_repair_a_quirk_are_accepted(tmp_path):
    """Those that the table names; a recipe that repairs all of them is a recipe."""
    content = yaml.load(ROOT / "params.yaml")
    repaired = {
        "selection.replacement": False, "caption.before_first_year": None, "caption.no_quality_above_id": None,
        "train.warmup_steps": 100, "train.last_step_divisor": "actual", "train.crop_conditioning": "real",
        "train.timestep_freq_shift": 0, "train.text_projection": "sdxl",
    }  # fmt: skip
    meanings = {row[0].strip("`"): row[3] for row in EXPLAINED}
    for key, value in repaired.items():
        section, name = key.split(".")
        content[section][name] = value
        assert ("null" if value is None else str(value).lower()) in meanings[key]
    with open(tmp_path / "params.yaml", "w") as file:
        yaml.dump(content, file)
    assert load(tmp_path / "params.yaml").train.crop_conditioning == "real"
    assert repaired.keys() == {key for key, meaning in meanings.items() if meaning.startswith("**Q**")}
