"""The one reader of params.yaml, dvc.yaml and dvc.lock: YAML 1.2, as DVC reads it (4e-5 is a number).

A stranger's file cannot exhaust this process: its size is limited, and aliases, a few of which can stand for billions
of values, are refused.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.composer import Composer
from ruamel.yaml.events import AliasEvent

from kohaku_delta.errors import UserError

MAX_BYTES = 8 << 20  # the release's dvc.lock has 0.1 MB


class NoAliasComposer(Composer):
    def compose_node(self, parent, index):
        if self.parser.check_event(AliasEvent):
            raise YAMLError("it uses YAML's aliases, which DVC never writes")
        return super().compose_node(parent, index)


@lru_cache(maxsize=8)
def _parse(text: str) -> Any:
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = NoAliasComposer
    return yaml.load(text)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Callers share it and must not change it. Raises UserError for a file that is missing,
    too large, not YAML, or that uses aliases.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(
                f"{path} has more than {MAX_BYTES:,} bytes; params.yaml, dvc.yaml and dvc.lock are smaller."
            )
        return _parse(content.decode("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist. Name a recipe's folder (with dvc.yaml, params.yaml and dvc.lock) or a bundle; "
            "run a stage in a recipe's folder, or with --params."
        ) from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML that can be read: {' '.join(str(error).split())[:200]}") from None
