"""The table of docs/fidelity.md, row for row, each with the value that this build ran with."""

import json
from dataclasses import dataclass
from pathlib import Path

from kohaku_delta.errors import UserError
from kohaku_delta.params import Recipe
from kohaku_delta.report import markdown

FILE = Path("docs/fidelity.md")
HEADINGS = ["the release", "this recipe", "key"]


@dataclass(frozen=True)
class FidelityRow:
    release: str  # HTML
    recipe: str  # HTML
    key: str  # of params.yaml; empty if the row has none
    value: str  # of that key in this build, as JSON


def read_fidelity_rows(root: Path, recipe: Recipe) -> list[FidelityRow]:
    """The rows of the repository at `root`; none if it lacks the document (a recipe outside its repository)."""
    path = root / FILE
    if not path.is_file():
        return []
    parser = markdown.parser()
    try:
        tokens = parser.parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text. Restore it from the repository.") from None
    cells: list[str] = []
    for token in tokens:
        if token.type == "table_open":
            cells = []
        elif token.type == "inline":
            cells.append(token.content)
        elif token.type == "table_close" and cells[:3] == HEADINGS:
            rows = zip(*(cells[column::3] for column in range(3)), strict=True)
            return [
                FidelityRow(parser.renderInline(release), parser.renderInline(here), *_value(key, recipe))
                for release, here, key in list(rows)[1:]
            ]
    raise UserError(f"{path} has no table with the headings {', '.join(HEADINGS)}. Restore it from the repository.")


def _value(cell: str, recipe: Recipe) -> tuple[str, str]:
    """The key that the cell names, and this build's value of it; the document itself gives the release's value."""
    key = cell.strip("`").partition(":")[0]
    value = recipe.model_dump(by_alias=True)
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return "", ""
        value = value[part]
    return key, json.dumps(value, ensure_ascii=False)
