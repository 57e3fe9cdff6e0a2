"""The one reader of params.yaml, dvc.yaml and dvc.lock: YAML 1.2, as DVC reads it (4e-5 is a number).

A stranger's file cannot exhaust this process: its size is limited, and aliases, a few of which can stand for billions
of values, are refused. What is read is what DVC writes: mappings with texts as keys, lists, texts, numbers, true,
false and null; a date, a set, a tuple or bytes are refused.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.composer import Composer
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


@lru_cache(maxsize=8)
def _parse(text: str) -> Any:
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = NoAliasComposer
    content = yaml.load(text)
    _check(content)
    return content


def _check(value: Any, path: str = "") -> None:
    """Raises ValueError for a value that neither DVC nor JSON knows. path: its dotted key."""
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise ValueError(
                    f'{path}: the key {key!r:.80} needs quotes ("{key!s:.80}"): DVC cannot compare files whose keys '
                    "are not texts"
                )
            _check(key, path)
            _check(item, f"{path}.{key}" if path else key)
    elif type(value) is list:
        for item in value:
            _check(item, path)
    elif type(value) is str:
        value.encode()  # half of a surrogate pair is no character
        if "\0" in value:
            raise ValueError(f"{path} holds a character 0, which no path and no text has")
    elif type(value) is int:
        if not -(1 << 63) <= value < 1 << 64:
            raise ValueError(f"{path} is a whole number of more than 64 bits")
    elif value is not None and type(value) not in (bool, float):
        raise ValueError(f"{path} is of YAML's type {type(value).__name__}, which DVC does not write")


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Callers share it and must not change it. Raises UserError for a file that is missing,
    too large, not YAML, or that uses aliases.
    """
    try:
        content = read_regular(path, MAX_BYTES, "params.yaml, dvc.yaml and dvc.lock are smaller.")
        return _parse(content.decode("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist. Name a recipe's folder (with dvc.yaml, params.yaml and dvc.lock) or a bundle; "
            "run a stage in a recipe's folder, or with --params."
        ) from None
    except FAULTS as error:
        raise UserError(f"{path} is not YAML that can be read: {' '.join(str(error).split())[:300]}") from None
