"""Invariant: the table is docs/fidelity.md's, row for row, each with the value that this build ran with; nothing of it
is said twice.
"""

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
    release: str  # as HTML
    here: str
    key: str
    value: str  # of that key in this build; empty where the row has none


def read_fidelity_rows(root: Path, recipe: Recipe) -> list[FidelityRow]:
    """The rows of the repository at `root`; none where the document is not there (a recipe apart from its repository)."""
    path = root / FILE
    if not path.is_file():
        return []
    try:
        tokens = markdown.reader().parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text. Take it from the repository again.") from None
    for place, token in enumerate(tokens):
        if token.type == "table_open":
            cells = _cells(tokens[place:])
            if [text for text, _ in cells[:3]] == HEADINGS:
                return [_row(*cells[start : start + 3], recipe) for start in range(3, len(cells) - 2, 3)]
    raise UserError(f"{path} has no table with the headings {', '.join(HEADINGS)}. Take it from the repository again.")


def _cells(tokens: list) -> list[tuple[str, str]]:
    """(text, HTML) of each cell of the table that `tokens` begin with."""
    found, reader = [], markdown.reader()
    for token in tokens:
        if token.type == "table_close":
            break
        if token.type == "inline":
            found.append((token.content, reader.renderInline(token.content)))
    return found


def _row(release: tuple[str, str], here: tuple[str, str], key: tuple[str, str], recipe: Recipe) -> FidelityRow:
    name, value = (
        key[0].strip("`").partition(":")[0],
        recipe.model_dump(by_alias=True),
    )  # the document gives the release's value; here stands this build's
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return FidelityRow(release[1], here[1], "", "")
        value = value[part]
    return FidelityRow(release[1], here[1], name, json.dumps(value, ensure_ascii=False))
