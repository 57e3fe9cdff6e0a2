"""The code of a stage: every file that it may run, and every library that these files import, as the lock has it.

A Python file counts by the digest of its syntax tree without docstrings: comments, docstrings and formatting make no
stage run again, a changed constant does. Another file counts by its bytes if a module beside it names it in a string
(a template). The stage `code` writes these descriptions to build/code/<stage>.json; all other stages depend on their
own, and a training compares it before it resumes.
"""

import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from kohaku_delta import paths, strict_model
from kohaku_delta.errors import UserError
from kohaku_delta.mappings import differing_keys
from kohaku_delta.printing import format_some
from kohaku_delta.regular_files import read_regular
from kohaku_delta.strict_model import StrictModel

PACKAGE, DISTRIBUTION = "kohaku_delta", "kohaku-delta"
MAX_BYTES = 1 << 20  # of a description; that of train has 20 kB


class Library(StrictModel):
    """A distribution in the lock: its version, and one digest of the hashes that the lock allows."""

    version: str
    hashes: str


class StageCode(StrictModel):
    """files: path in the repository → sha256 of the syntax tree, or of the bytes; libraries by canonical name."""

    stage: str
    files: dict[str, str]
    libraries: dict[str, Library]


def file_digest(name: str, content: bytes) -> str:
    """The sha256 of a Python file's syntax tree without docstrings, or of another file's bytes. Raises UserError for
    Python that cannot be parsed.
    """
    if not name.endswith(".py"):
        return hashlib.sha256(content).hexdigest()
    tree = _parse(name, content)
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and ast.get_docstring(node, clean=False) is not None
        ):
            del node.body[0]
    return hashlib.sha256(ast.dump(tree).encode("utf-8", "surrogatepass")).hexdigest()


def _parse(name: str, content: bytes) -> ast.Module:
    try:
        return ast.parse(content)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{name} is not Python that can be parsed: {error}.") from None


@cache
def _references(path: Path) -> tuple[frozenset[str], frozenset[str]]:
    """The modules that a Python file imports anywhere, and its strings that may be names of files."""
    nodes = list(ast.walk(_parse(str(path), path.read_bytes())))
    modules: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return frozenset(modules), frozenset(text for text in strings if re.fullmatch(r"[\w.-]{1,100}", text))


def _module_file(source: Path, module: str) -> Path | None:
    """The file of a module of this project; None for a name inside a module."""
    path = source.joinpath(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def closure_files(script: Path) -> list[Path]:
    """Every file that `script` (stages/<stage>.py) may run or read as code, itself included, sorted."""
    source = script.resolve().parents[1] / "src"
    files, waiting = {script.resolve()}, [script.resolve()]
    while waiting:
        path = waiting.pop()
        modules, strings = _references(path)
        files |= {path.parent / name for name in strings if not name.endswith(".py") and (path.parent / name).is_file()}
        for module in modules:
            parts = module.split(".")
            for depth in range(1, len(parts) + 1) if parts[0] == PACKAGE else ():
                file = _module_file(source, ".".join(parts[:depth]))
                if file and file not in files:
                    files.add(file)
                    waiting.append(file)
    return sorted(files)


@cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def closure_libraries(files: Iterable[Path], lock: Path) -> dict[str, Library]:
    """The distributions that these files import, and those that they require, as the lock has them. Raises UserError
    for one that the lock lacks.
    """
    imported = {module.split(".")[0] for file in files if file.suffix == ".py" for module in _references(file)[0]}
    modules = imported - {PACKAGE} - sys.stdlib_module_names
    waiting: list[str] = [canonicalize_name(name) for module in modules for name in _distributions().get(module, ())]
    locked, libraries = locked_libraries(lock), {}
    while waiting:
        name = waiting.pop()
        if name not in libraries:
            if name not in locked:
                raise UserError(
                    f"{name} is imported and {lock} does not lock it. Add it to requirements/recipe.in and run "
                    "`make lock`."
                )
            libraries[name] = locked[name]
            waiting += _requirements(name)
    return dict(sorted(libraries.items()))


@cache
def _requirements(name: str) -> tuple[str, ...]:
    """The canonical names of what an installed distribution requires on this host, without extras."""
    try:
        requirements = map(Requirement, metadata.requires(name) or ())
    except metadata.PackageNotFoundError:
        raise UserError(f"{name} is locked and not installed here. Run `make repro`, which installs it.") from None
    return tuple(
        canonicalize_name(requirement.name)
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    )


@cache
def locked_libraries(lock: Path) -> dict[str, Library]:
    """Every distribution of a hash-locked requirements file, by canonical name. Raises UserError for a line without
    version or hash.
    """
    remedy = "Restore the file from the repository, or run `make lock`."
    try:
        lines = read_regular(lock, MAX_BYTES).decode("utf-8").replace("\\\n", " ").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{lock}, the lock of the recipe's libraries, cannot be read. {remedy}") from None
    libraries: dict[str, Library] = {}
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        pin, *hashes = line.split("--hash=")
        try:
            requirement = Requirement(pin.strip())
        except InvalidRequirement:
            raise UserError(f"{lock}: {pin.strip()!r} is not a requirement. {remedy}") from None
        versions = list(requirement.specifier)
        if len(versions) != 1 or versions[0].operator != "==" or not hashes:
            raise UserError(f"{lock}: {requirement.name} is not pinned by version and hash. {remedy}")
        allowed = "\n".join(sorted(allowed_hash.split()[0] for allowed_hash in hashes))
        digest = hashlib.sha256(allowed.encode()).hexdigest()
        libraries[canonicalize_name(requirement.name)] = Library(version=versions[0].version, hashes=digest)
    return libraries


def records_filename(lock: str) -> str:
    """The file beside the lock `lock` (cpu, cuda) with the digest of each wheel's list of files."""
    return f"{lock}.records.json"


def read_records(path: Path) -> dict[str, str]:
    """Library → digest of its wheel's list of files; empty if there is no such file. tools/write_library_records writes
    it. Raises UserError for one that is malformed.
    """
    if not path.is_file():
        return {}
    return strict_model.read_json(path, dict[str, str], MAX_BYTES, "Run tools/write_library_records.")


def describe_stage(script: Path, lock: Path) -> StageCode:
    """The code of the stage in `script` (stages/<stage>.py), with the libraries of the file `lock`."""
    libraries = closure_libraries(closure_files(script), lock)
    return StageCode(stage=script.stem, files=file_digests(script), libraries=libraries)


def file_digests(script: Path) -> dict[str, str]:
    """Path in the repository → digest of every file of a stage's code."""
    root = script.resolve().parents[1]
    return {
        path.relative_to(root).as_posix(): file_digest(path.name, path.read_bytes()) for path in closure_files(script)
    }


def verified_code(script: Path) -> StageCode | None:
    """The build/code/<stage>.json of a stage; None if there is none (the stage `code` itself, or a stage that is run by
    hand before it). Raises UserError if it does not describe the code that runs now.
    """
    path = Path(paths.CODE) / f"{script.stem}.json"
    if not path.is_file():
        return None
    described, current = load(path), file_digests(script)
    if differing := differing_keys(described.files, current):
        raise UserError(
            f"{path} does not describe the code that runs now, which differs in {format_some(differing)}. Run "
            "`dvc repro`, which describes the code first."
        )
    return described


def dumps(code: StageCode) -> str:
    """The content of build/code/<stage>.json: the same text for the same code."""
    return json.dumps(code.model_dump(), indent=1, sort_keys=True) + "\n"


def load(path: Path) -> StageCode:
    """The content of a build/code/<stage>.json. Raises UserError for one that the stage `code` did not write."""
    return strict_model.read_json(path, StageCode, MAX_BYTES, "Run `dvc repro code`.")
