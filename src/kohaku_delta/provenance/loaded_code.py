"""What the process of a stage loaded, compared with what its libraries' wheels installed.

A wheel lists its files with their sha256 in RECORD, and the installer keeps that list. Every Python module and shared
object of this process that lies in a library is hashed and compared with it. The lists themselves are compared by the
audit with requirements/<lock>.records.json, which tools/write_library_records writes from a fresh installation.

Not seen: bytecode in __pycache__ that differs from the file beside it, the interpreter, its standard library and the
system's libraries, other processes (the ranks of a training load what the first process loads), and what was loaded and
removed again. No path is recorded but those inside of libraries.
"""

import base64
import csv
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from kohaku_delta.formats import hashing

# the environment variables by which other code than the libraries' gets into a process
VARIABLES = (
    "LD_AUDIT",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "PYTHONBREAKPOINT",
    "PYTHONHOME",
    "PYTHONINSPECT",
    "PYTHONPATH",
    "PYTHONPYCACHEPREFIX",
    "PYTHONSTARTUP",
    "PYTHONUSERBASE",
)
STARTUP = ("sitecustomize", "usercustomize")  # modules that Python imports by itself
INSTALLERS = {"INSTALLER", "REQUESTED", "RECORD", "direct_url.json", "uv_cache.json"}  # differ between installers


@dataclass(frozen=True)
class _Library:
    name: str
    version: str
    files: dict[str, str]  # path of an installed file → its sha256 by RECORD
    digest: str  # of RECORD, without what the installer added


def _installed() -> Iterator[_Library]:
    """Every installed distribution that has a RECORD."""
    for distribution in metadata.distributions():
        listed, name = distribution.read_text("RECORD"), distribution.metadata["Name"]
        if not listed or not name:
            continue
        folder = os.path.realpath(str(distribution.locate_file("")))
        rows = {}
        for row in csv.reader(listed.splitlines()):
            kept = len(row) == 3 and row[1].startswith("sha256=") and not row[0].startswith(("..", "/"))
            if kept and not row[0].endswith(".pyc") and os.path.basename(row[0]) not in INSTALLERS:
                rows[row[0]] = base64.urlsafe_b64decode(row[1][7:] + "=").hex()
        digest = hashlib.sha256("".join(f"{rows[path]}  {path}\n" for path in sorted(rows)).encode()).hexdigest()
        files = {f"{folder}/{path}": sha256 for path, sha256 in rows.items()}
        yield _Library(canonicalize_name(name), distribution.version, files, digest)


def record_digests(names: Iterable[str]) -> dict[str, str]:
    """Canonical name → digest of its RECORD, of those of these libraries that are installed."""
    wanted = set(names)
    return {library.name: library.digest for library in _installed() if library.name in wanted}


def changed_files() -> list[str]:
    """Every installed file that differs from its RECORD, or is missing."""
    files = {path: sha256 for library in _installed() for path, sha256 in library.files.items()}
    present = [path for path in sorted(files) if os.path.isfile(path)]
    digests = hashing.digest_paths(map(Path, present), md5=False)
    differing = {path for path, digest in zip(present, digests, strict=True) if digest.sha256 != files[path]}
    return sorted(differing | (files.keys() - set(present)))


def describe(names: Iterable[str], repository: Path) -> dict[str, Any]:
    """What this process loaded. names: the libraries of the stage; repository: the folder of src/ and stages/.

    records: as record_digests; changed: files of libraries that differ from their RECORD, or that it lacks; others:
    version of each library that was loaded and is none of `names`; foreign: modules that belong to neither a library,
    the repository nor Python; startup: what Python ran by itself; variables: those of VARIABLES that are set; files,
    bytes: how much was compared.
    """
    libraries = list(_installed())
    wanted = set(names)
    owner = {path: library for library in libraries for path in library.files}
    folders = tuple({f"{os.path.dirname(os.path.realpath(path))}/" for path in _site_folders()})
    own = tuple(f"{os.path.realpath(repository)}/{name}/" for name in ("src", "stages"))
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    python = tuple(f"{path}/" for place in places for path in {place, os.path.realpath(place)})
    loaded, foreign = _mapped_files(folders), set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        path = os.path.realpath(file)
        if not os.path.isabs(file):  # built in, or made by a library in memory (torch.ops)
            continue
        if path in owner:
            loaded.add(path)
        elif not path.startswith((*own, *python)) and not file.startswith(python):
            foreign.add(name)
    owned = sorted(loaded & owner.keys())
    digests = hashing.digest_paths(map(Path, owned), md5=False)
    changed = [
        f"{owner[path].name}: {os.path.basename(path)}"
        for path, digest in zip(owned, digests, strict=True)
        if digest.sha256 != owner[path].files[path]
    ]
    others = {owner[path].name: owner[path].version for path in owned if owner[path].name not in wanted}
    return {
        "records": {library.name: library.digest for library in libraries if library.name in wanted},
        "changed": changed + sorted(f"no library: {os.path.basename(path)}" for path in loaded - owner.keys()),
        "others": others,
        "foreign": sorted(foreign),
        "startup": _startup(owner.keys()),
        "variables": sorted(_initial_environment() & set(VARIABLES)),
        "files": len(loaded),
        "bytes": sum(digest.bytes for digest in digests),
    }


def _initial_environment() -> set[str]:
    """The variables that this process was started with and that are not empty; libraries set some later."""
    try:
        content = Path("/proc/self/environ").read_bytes()
    except OSError:
        return {name for name, value in os.environ.items() if value}
    return {
        name.decode(errors="replace")
        for name, _, value in (row.partition(b"=") for row in content.split(b"\0"))
        if value
    }


def _site_folders() -> list[str]:
    return [f"{sysconfig.get_path(name)}/x" for name in ("purelib", "platlib")]


def _mapped_files(folders: tuple[str, ...]) -> set[str]:
    """Files in these folders that are mapped into this process: shared objects."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            paths = {line.split(None, 5)[5].rstrip("\n") for line in file if line.count("/") and len(line.split()) > 5}
    except OSError:
        return set()
    return {path for path in paths if path.startswith(folders) and ".so" in os.path.basename(path)}


def _startup(known: Iterable[str]) -> list[str]:
    """sitecustomize and usercustomize if they were imported, and the .pth files with code that are of no library."""
    known, found = set(known), [name for name in STARTUP if name in sys.modules]
    for folder in {os.path.dirname(path) for path in _site_folders()}:
        for path in sorted(Path(os.path.realpath(folder)).glob("*.pth")):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            if str(path) not in known and any(line.startswith(("import ", "import\t")) for line in lines):
                found.append(path.name)
    return found
