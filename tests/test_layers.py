"""The rooms of kohaku_delta form layers: no import points upwards, and no rooms import each other in a circle."""

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "kohaku_delta"
LAYERS = [  # top to bottom
    {"__main__", "cli"},
    {"publishing"},
    {"report", "preflight", "verify"},
    {"training", "preview", "dataset"},
    {"weights", "danbooru", "hub"},
    {"sdxl", "formats", "provenance", "sandbox"},
    {
        "errors",
        "mappings",
        "params",
        "numerics",
        "paths",
        "atomic_files",
        "parallel",
        "printing",
        "process_facts",
        "regular_files",
        "strict_model",
        "units",
        "yaml_file",
    },
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
EXCEPTIONS: set[tuple[str, str]] = set()  # (importing file, imported room) that points upwards: to be emptied


@functools.cache
def imports() -> list[tuple[str, str]]:
    """(file in the package, imported room) of every import, those inside functions and of relative names included."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        file = path.relative_to(PACKAGE)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = ["kohaku_delta", *file.parts[: -node.level]] if node.level else []
                base += node.module.split(".") if node.module else []
                modules = [".".join([*base, alias.name]) for alias in node.names]
            else:
                continue
            found |= {(file.as_posix(), name.split(".")[1]) for name in modules if name.startswith("kohaku_delta.")}
    return sorted(found)


def room_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def test_every_room_has_its_layer():
    rooms = {room_of(path.relative_to(PACKAGE).as_posix()) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms == LEVEL.keys()
    assert {room for _, room in imports()} <= LEVEL.keys()


def test_no_import_points_upwards():
    upwards = {(file, room) for file, room in imports() if LEVEL[room_of(file)] > LEVEL[room]}
    assert upwards == EXCEPTIONS


def test_no_rooms_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {room: set() for room in LEVEL}
    for file, room in imports():
        if room != room_of(file) and (file, room) not in EXCEPTIONS:
            graph[room_of(file)].add(room)
    TopologicalSorter(graph).prepare()  # raises CycleError and names the circle


@pytest.mark.parametrize("room", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_each_room_says_in_one_line_what_it_is(room):
    docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    assert docstring and len(docstring.partition("\n\n")[0].splitlines()) == 1, docstring
