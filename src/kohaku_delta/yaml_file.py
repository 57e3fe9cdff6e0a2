"""The one reader of params.yaml, dvc.yaml and dvc.lock: YAML 1.2, as DVC reads it (4e-5 is a number).

A stranger's file cannot exhaust this process: its size is limited, and aliases, a few of which can stand for billions
of values, are refused. What is read is what DVC writes: mappings with texts as keys, lists, texts, numbers, true,
false and null; a date, a set, a tuple or bytes are refused.
"""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.composer import Composer
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent

from kohaku_delta.errors import UserError
from kohaku_delta.regular_files import read_regular

MAX_BYTES = 1 << 19  # the release's dvc.lock has 0.1 MB; parsing takes up to 20 s per MB
# what ruamel raises for a value that does not fit its tag, such as !!int ""
FAULTS = (
    YAMLError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class NoAliasComposer(Composer):
    def compose_node(self, parent, index):
        if self.parser.check_event(AliasEvent):
            raise YAMLError("it uses YAML's aliases, which DVC never writes")
        return super().compose_node(parent, index)


class LineConstructor(SafeConstructor):
    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (YAMLError, RecursionError):
            raise
        except FAULTS:  # of Python's int() and its kind, which know no line
            value = f"{node.value:.40}" if isinstance(node.value, str) else "this"
            raise YAMLError(f"line {node.start_mark.line + 1}: {value} is not a value that can be read") from None


@lru_cache(maxsize=8)
def _parse(text: str) -> Any:
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = NoAliasComposer
    yaml.Constructor = LineConstructor
    content = yaml.load(text)
    _check(content)
    return content


def _check(value: Any, path: str = "") -> None:
    """Raises ValueError for a value that neither DVC nor JSON knows. path: its dotted key."""
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                place = f"{path}: " if path else ""
                raise ValueError(
                    f'{place}the key {key!r:.80} needs quotes ("{key!s:.80}"): DVC cannot compare files whose keys are '
                    "not texts"
                )
            _check(key, path)
            _check(item, f"{path}.{key}" if path else key)
    elif type(value) is list:
        for item in value:
            _check(item, path)
    elif type(value) is str:
        if "\0" in value:
            raise ValueError(f"{path} holds a character 0, which no path and no text has")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{path} holds half of a surrogate pair, which is no character")
    elif type(value) is int:
        if not -(1 << 63) <= value < 1 << 64:
            raise ValueError(f"{path} is a whole number of more than 64 bits")
    elif type(value) is float:
        if not math.isfinite(value):  # an overflow too: 1e999
            raise ValueError(f"{path} is {value}, and every number must be finite")
    elif value is not None and type(value) is not bool:
        kind = type(value).__name__
        raise ValueError(f"{path} is of YAML's type {kind}, which DVC does not write: put it in quotes if it is a text")


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Callers share it and must not change it. Raises UserError for a file that is missing,
    too large, not YAML, or that uses aliases.
    """
    try:
        content = read_regular(path, MAX_BYTES, "params.yaml, dvc.yaml and dvc.lock are smaller.")
        return _parse(content.decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} does not exist. Name a recipe's folder (with dvc.yaml, params.yaml and dvc.lock) or a bundle; "
            "run a stage in a recipe's folder, or with --params."
        ) from None
    except FAULTS as error:
        raise UserError(f"{path} is not YAML that can be read: {' '.join(_describe(error).split())[:300]}.") from None


def _describe(error: Exception) -> str:
    """What is wrong and in which line, without the parser's name of the file and its advice to its programmers."""
    if isinstance(error, UnicodeDecodeError):
        line, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        return f"line {line} has the byte 0x{byte:02x}, which is not UTF-8: save the file as UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MarkedYAMLError) and error.problem and error.problem_mark:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return str(error)
