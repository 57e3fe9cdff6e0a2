"""Models of the content of files, and the sentences that a file gets which does not fit its model.

Every reader of JSON and YAML uses these: a file is read whole, up to a limit, and fits its model, or a UserError names
the file, the key, what stands there, what belongs there, and what to do.
"""

from pathlib import Path
from typing import Any

import pydantic_core
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from kohaku_delta import regular_files
from kohaku_delta.errors import UserError
from kohaku_delta.printing import printable

MAX_SENTENCES, MAX_SENTENCE, MAX_ERRORS = 5, 400, 1000
EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}


class StrictModel(BaseModel):
    """A mapping in a file. An unknown key or a value of another type is an error; an instance never changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PartialModel(StrictModel):
    """The same for a file of which only some keys are read: unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore")


def describe_errors(source: Path | str, error: ValidationError, content: Any, remedy: str = "") -> list[str]:
    """One sentence per wrong key of `content` (what was validated), at most five, cut; the remedy ends the last one."""
    if error.error_count() > MAX_ERRORS:  # each of them would take memory
        return [f"{source}: more than {MAX_ERRORS:,} of its values are not what they should be. {remedy}".rstrip()]
    sentences: list[str] = []
    values: dict[str, Any] = {}
    expected: dict[str, list[str]] = {}
    for details in error.errors(include_url=False):
        kind, context = details["type"], details.get("ctx", {})
        key = _key(details["loc"], kind, content) or "the file's content"
        if kind == "extra_forbidden":
            sentences.append(f"the key {key} is not known." + ("" if remedy else " Remove it, or check its spelling."))
        elif kind == "missing":
            sentences.append(f"the key {key} is missing.")
        elif kind == "value_error":
            sentences.append(f"{key}: {context['error']}.")
        elif kind == "json_invalid":
            sentences.append(f"it is not JSON that can be read: {context['error']}.")
        else:
            values[key] = details["input"]
            expected.setdefault(key, []).append(_expected(kind, context, details["msg"]))
    wrong = [f"{key} is {values[key]!r:.80}; it must be {' or '.join(kinds)}." for key, kinds in expected.items()]
    lines = [f"{source}: {_cut(sentence)}" for sentence in (wrong + sentences)[:MAX_SENTENCES]]
    return [*lines[:-1], f"{lines[-1]} {remedy}".rstrip()]


def _key(location: tuple[int | str, ...], kind: str, content: Any) -> str:
    """The dotted key of an error. pydantic's location also names members of unions, which are no keys of the file."""
    parts = []
    for part in location:
        if isinstance(content, dict) and (part in content or str(part) in content):
            content = content.get(part, content.get(str(part)))
        elif isinstance(content, list) and isinstance(part, int) and part < len(content):
            content = content[part]
        elif kind != "missing" or part is not location[-1]:
            continue
        parts.append(str(part))
    return ".".join(parts)


def _expected(kind: str, context: dict, message: str) -> str:
    if kind == "too_short":
        return f"a list with at least {context['min_length']} entries"
    return EXPECTED.get(kind) or message.replace("Input should be ", "").replace(
        "String should match pattern", "a text of the form"
    )


def _cut(text: str) -> str:
    text = printable(text)
    return text if len(text) <= MAX_SENTENCE else f"{text[:MAX_SENTENCE]} …"


def validate(source: Path | str, kind: Any, content: Any, remedy: str = "") -> Any:
    """`content`, already parsed, as an instance of `kind`, a StrictModel or another type that pydantic validates."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise UserError(*describe_errors(source, error, content, remedy)) from None


def read_json(path: Path, kind: Any, max_bytes: int, remedy: str = "") -> Any:
    """A JSON file as an instance of `kind`. Raises FileNotFoundError, and UserError for what does not fit."""
    return parse_json(path, kind, regular_files.read_regular(path, max_bytes, remedy), remedy)


def parse_json(source: Path | str, kind: Any, content: bytes, remedy: str = "") -> Any:
    """JSON text as an instance of `kind`."""
    try:
        return TypeAdapter(kind).validate_json(content)
    except ValidationError as error:
        try:
            parsed = pydantic_core.from_json(content)
        except ValueError:
            parsed = None
        raise UserError(*describe_errors(source, error, parsed, remedy)) from None
