"""The code of a stage: every file that it may run, by the digest of its syntax tree, and every library that these files
import, as the lock has it.

A file's digest leaves out comments, docstrings, formatting and positions: such a change makes no stage run again, a
changed constant does. A file that is no Python and that a module beside it names by a string (a template) counts by its
bytes. `describe` is what the stage `code` writes to build/code/<stage>.json, what all other stages depend on, and what
a training compares before it goes on.
"""

import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from kohaku_delta import strict_model
from kohaku_delta.errors import UserError
from kohaku_delta.strict_model import StrictModel

PACKAGE, FOLDER = "kohaku_delta", "build/code"
MOST = 1 << 20  # bytes of such a file; that of train has 20 kB


class Library(StrictModel):
    """A distribution of the lock: its version, and one digest of the hashes that the lock allows."""

    version: str
    hashes: str


class StageCode(StrictModel):
    """files: path in the repository → sha256 of the syntax tree, or of the bytes; libraries by canonical name."""

    stage: str
    files: dict[str, str]
    libraries: dict[str, Library]


def file_digest(name: str, content: bytes) -> str:
    """The sha256 of a file of code: of a Python file's syntax tree without docstrings, of another file's bytes. Refuses
    what is no Python.
    """
    if not name.endswith(".py"):
        return hashlib.sha256(content).hexdigest()
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{name} is not Python that can be read: {error}.") from None
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and ast.get_docstring(node, clean=False) is not None
        ):
            del node.body[0]
    return hashlib.sha256(ast.dump(tree).encode("utf-8", "surrogatepass")).hexdigest()


@cache
def _read(path: Path) -> tuple[bytes, frozenset[str], frozenset[str]]:
    """A Python file's content, the modules that it imports anywhere, and the names of files that its strings may be."""
    content = path.read_bytes()
    try:
        nodes = list(ast.walk(ast.parse(content)))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not Python that can be read: {error}.") from None
    modules: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return content, frozenset(modules), frozenset(text for text in strings if re.fullmatch(r"[\w.-]{1,100}", text))


def _module_file(source: Path, module: str) -> Path | None:
    """The file of one of the project's modules; None for a name inside a module."""
    path = source.joinpath(*module.split("."))
    return next((each for each in (path / "__init__.py", path.with_suffix(".py")) if each.is_file()), None)


def closure_files(script: Path) -> list[Path]:
    """Every file of the repository that `script` (stages/<stage>.py) may run or read as code, itself included, sorted."""
    source = script.resolve().parents[1] / "src"
    found, waiting = {script.resolve()}, [script.resolve()]
    while waiting:
        path = waiting.pop()
        _, modules, strings = _read(path)
        found |= {path.parent / name for name in strings if not name.endswith(".py") and (path.parent / name).is_file()}
        for module in modules:
            parts = module.split(".")
            for depth in range(1, len(parts) + 1) if parts[0] == PACKAGE else ():
                file = _module_file(source, ".".join(parts[:depth]))
                if file and file not in found:
                    found.add(file)
                    waiting.append(file)
    return sorted(found)


@cache
def _distributions() -> dict[str, list[str]]:
    return metadata.packages_distributions()


def closure_libraries(paths: Iterable[Path], lock: Path) -> dict[str, Library]:
    """The distributions that these files import, and what those require, as the lock has them. Refuses one that the
    lock lacks.
    """
    modules = (
        {module.split(".")[0] for path in paths if path.suffix == ".py" for module in _read(path)[1]}
        - {PACKAGE}
        - sys.stdlib_module_names
    )
    waiting = sorted({canonicalize_name(name) for module in modules for name in _distributions().get(module, ())})
    locked, found = locked_libraries(lock), {}
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        if name not in locked:
            raise UserError(
                f"{name} is imported and {lock} does not lock it. Add it to requirements/recipe.in and run `make lock`."
            )
        found[name] = locked[name]
        waiting += [each for each in _requirements(name) if each not in found]
    return dict(sorted(found.items()))


@cache
def _requirements(name: str) -> tuple[str, ...]:
    """What an installed distribution requires here, extras left out."""
    try:
        asked = map(Requirement, metadata.requires(name) or ())
    except metadata.PackageNotFoundError:
        raise UserError(
            f"{name} of the lock is not installed here. Run `make repro`, which sets the environment up."
        ) from None
    return tuple(
        canonicalize_name(each.name) for each in asked if each.marker is None or each.marker.evaluate({"extra": ""})
    )


@cache
def locked_libraries(lock: Path) -> dict[str, Library]:
    """Every distribution of a hash-locked requirements file, by its canonical name. Refuses a line that pins nothing or
    has no hash.
    """
    try:
        lines = lock.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"{lock} cannot be read: it is the lock of the recipe's libraries. Restore it from the repository."
        ) from None
    found: dict[str, Library] = {}
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        pin, *hashes = line.split("--hash=")
        try:
            asked = Requirement(pin.strip())
        except InvalidRequirement:
            raise UserError(
                f"{lock}: {pin.strip()!r} is no requirement. Restore the file from the repository, or run `make lock`."
            ) from None
        (only,) = asked.specifier if len(asked.specifier) == 1 else (None,)
        if only is None or only.operator != "==" or not hashes:
            raise UserError(
                f"{lock}: {asked.name} is not pinned by version and hash. Restore the file from the repository, or run `make lock`."
            )
        allowed = sorted(each.split()[0] for each in hashes)
        found[canonicalize_name(asked.name)] = Library(
            version=only.version, hashes=hashlib.sha256("\n".join(allowed).encode()).hexdigest()
        )
    return found


def describe_stage(script: Path, lock: Path) -> StageCode:
    """The code of the stage that `script` is, under the lock of its libraries."""
    return StageCode(
        stage=script.stem, files=file_digests(script), libraries=closure_libraries(closure_files(script), lock)
    )


def file_digests(script: Path) -> dict[str, str]:
    """Path in the repository → digest of every file of a stage's code."""
    root = script.resolve().parents[1]
    return {
        path.relative_to(root).as_posix(): file_digest(path.name, path.read_bytes()) for path in closure_files(script)
    }


def verified_code(script: Path) -> StageCode | None:
    """The description of a stage's code in this recipe's build/, on which its dvc.yaml depends. Refuses one that is not
    of the code at hand.

    None where there is none: the stage `code` itself, or a stage that is run by hand before it.
    """
    path = Path(FOLDER) / f"{script.stem}.json"
    if not path.is_file():
        return None
    told, here = load(path), file_digests(script)
    other = sorted(name for name in told.files.keys() | here.keys() if told.files.get(name) != here.get(name))
    if other:
        raise UserError(
            f"{path} describes other code than that at hand: {', '.join(other[:3])}{' …' if len(other) > 3 else ''} differs. "
            "Run `dvc repro`, which describes the code first."
        )
    return told


def dumps(code: StageCode) -> str:
    """As it lies in build/code/<stage>.json: the same text for the same code."""
    return json.dumps(code.model_dump(), indent=1, sort_keys=True) + "\n"


def load(path: Path) -> StageCode:
    """The content of a build/code/<stage>.json. Raises UserError for one that the stage `code` did not write."""
    return strict_model.read_json(path, StageCode, MOST, "Run `dvc repro code`.")
