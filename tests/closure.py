"""The project's own files that a script may run: every import statement in it, and in what it imports, wherever it stands in the file."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"


def _file(module: str) -> Path | None:
    path = SOURCE.joinpath(*module.split("."))
    for candidate in (path / "__init__.py", path.with_suffix(".py")):
        if candidate.is_file():
            return candidate
    return None


def _imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] == "kohaku_delta"}


def closure(script: Path) -> set[Path]:
    """The files under src/ that `script` may import, with the __init__.py of each package on the way."""
    files, waiting = set(), [script]
    while waiting:
        for module in _imported(waiting.pop()):
            parts = module.split(".")
            for depth in range(1, len(parts) + 1):
                file = _file(".".join(parts[:depth]))
                if file and file not in files:
                    files.add(file)
                    waiting.append(file)
    return files
