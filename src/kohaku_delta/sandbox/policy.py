"""Invariant: what a stage may open follows from what anyone can read: its entry in dvc.yaml, its code, params.yaml,
inputs.json, and the options given by hand.

A default path counts only where the stage's entry in dvc.yaml names it; a path given by hand counts as it is. The
inputs of a stage are those that it has an option for. Outs may also lie beside what is given by hand. Paths are
absolute, links in their folders followed.
"""

import json
import os
import pwd
import re
import site
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.util import cache_from_source
from pathlib import Path

import click
from click.core import ParameterSource

from kohaku_delta.hub import verified_files
from kohaku_delta.params import Recipe, load
from kohaku_delta.provenance import import_closure
from kohaku_delta.provenance.stage_record import FOLDER

ASIDE = re.compile(r"/\.([^/]+)\.\d+\.aside(?=/|$)")  # how kohaku_delta.atomic_files calls what is not finished yet
PARTS = ("", "_vocab", "_merges", "_index")  # an option's inputs: the tokenizers' and the tars' are several files


@dataclass(frozen=True)
class StagePolicy:
    stage: str
    allowed: frozenset[str]  # files, and folders with all that is in them
    watched: frozenset[
        str
    ]  # the repository, the recipe's folder, the mirror, the home directory; elsewhere the system is not asked about
    listed: frozenset[str]  # folders whose list of names may be read: where Python looks for modules
    written: frozenset[str]  # the folders of outs and of training's state: new temporary files may be made there
    libraries: tuple[str, ...]  # the interpreter's folders: beginnings of paths that need no second look
    network: str  # "none" | "loopback" (between ranks) | "any"

    def may_open(self, path: str) -> bool:
        """Whether the file (an absolute path) is declared, or lies where nothing is asked. The nearest folder that is
        known decides.
        """
        while path not in self.allowed:
            if path in self.watched:
                return False
            if path == "/":
                return True
            path = os.path.dirname(path)
        return True


def canonical_path(path) -> str:
    """The file that a path names, as `Declared` knows it: of unfinished outs and compiled modules, what they are of."""
    path = os.path.realpath(path)
    if path.endswith(".aside") or ".aside/" in path:
        path = ASIDE.sub(r"/\1", path)
    folder, name = os.path.split(path)
    if folder.endswith("/__pycache__"):
        return f"{os.path.dirname(folder)}/{name.split('.')[0]}.py"
    if sys.pycache_prefix and name.endswith(".pyc") and folder.startswith(apart := _folder(sys.pycache_prefix)):
        return f"{folder.removeprefix(apart)}/{name.split('.')[0]}.py"
    return path


@cache
def _folder(path: str) -> str:
    return os.path.realpath(path)


def _link_and_target(path) -> set[str]:
    """Where a path lies, and where it leads to if it is a link."""
    path = os.path.abspath(path)
    lies = os.path.join(_folder(os.path.dirname(path)), os.path.basename(path)) if path != "/" else path
    return {lies, os.path.realpath(path)} if os.path.islink(path) else {lies}


def stage_entry(script: Path) -> dict | None:
    """What dvc.yaml says of the stage that `script` is; None where it is no stage."""
    pipeline = script.parents[1] / "dvc.yaml"
    if script.parent.name != "stages" or not pipeline.is_file():
        return None
    import yaml  # only here: worker processes are told what is declared

    return yaml.load(pipeline.read_text(encoding="utf-8"), yaml.CSafeLoader)["stages"].get(script.stem)


def _entry_paths(entries) -> list[str]:
    return [name for each in entries or [] for name in (each if isinstance(each, dict) else [each])]


def policy_for(script: Path, said: dict, context: click.Context) -> StagePolicy:
    """All that the stage may open, run with these options. `said`: its entry in dvc.yaml."""
    root, options, recipe_file = script.parents[1], context.params, context.params["params"]
    recipe, recipe_folder = load(recipe_file), os.path.dirname(os.path.realpath(recipe_file))
    outs = [name for kind in ("outs", "metrics", "plots") for name in _entry_paths(said.get(kind))]
    deps = _entry_paths(said.get("deps"))
    code = [name.replace("${root}", str(root)) for name in deps if name.startswith("${root}")] + _code(script, deps)
    paths = {name: value for name, value in options.items() if isinstance(value, Path)}
    named = [
        value
        for name, value in paths.items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT or str(value) in (*deps, *outs)
    ]
    written = {paths[each.name].parent for each in context.command.params if str(each.default) in outs}
    if script.stem == "code":  # the one stage whose outs lie in the folder that its option names
        written.add(options["out"])
    beside = [
        folder / Path(out).name for folder in written for out in outs
    ]  # caption's lists lie beside the captions, wherever these go
    libraries = _interpreter()
    inputs, folders = _inputs(options)
    mirror = os.path.join(recipe_folder, recipe.download.mirror)

    files = [
        recipe_file,
        root / "dvc.yaml",
        *code,
        *map(cache_from_source, code),
        *named,
        *beside,
        *inputs,
        *_indexes(options, inputs),
    ]
    files += [
        *libraries,
        *filter(None, [sys.pycache_prefix]),
        tempfile.gettempdir(),
        FOLDER,
    ]  # the last for the run's record
    files += [
        root / "requirements" / f"{recipe.requirements}.txt",
        Path(import_closure.FOLDER) / f"{script.stem}.json",
    ]  # what the run's own description of its code is made of
    if "inputs" in options:
        files.append(
            verified_files.stamps_path(options["inputs"])
        )  # read to see whether an input changed, and kept: it decides no bytes
    if "work" in options:
        written.add(options["work"] or Path(recipe.execution.work))
        files.append(options["work"] or recipe.execution.work)
    if script.stem == "download":
        files += [verified_files.stamps_path(options["out"]), os.path.join(recipe_folder, recipe.supplied)]
        from huggingface_hub import (
            constants,
        )  # where it keeps its token and notes; what it fetches is believed by its sha256 only

        written |= {Path(each) for each in (mirror, constants.HF_HOME)}
        files += [mirror, constants.HF_HOME, os.path.expanduser("~/.netrc"), *_pinned(recipe, recipe_folder)]
    watched = frozenset(_folder(str(each)) for each in (root, recipe_folder, mirror, *folders, *_homes())) - {"/"}
    return StagePolicy(
        script.stem,
        frozenset(each for file in files for each in _link_and_target(file)),
        watched,
        frozenset({_folder(each) for each in sys.path} | {_folder(os.path.dirname(each)) for each in code}),
        frozenset(_folder(str(folder)) for folder in written),
        tuple(
            f"{each}/" for each in sorted(libraries) if not any(f"{other}/".startswith(f"{each}/") for other in watched)
        ),
        _network(script.stem, options, recipe),
    )


def _code(script: Path, deps: list[str]) -> list[str]:
    """The files of the stage's code: as build/code/<stage>.json says, or, where that was not written yet, as its
    imports say.
    """
    told = Path(import_closure.FOLDER) / f"{script.stem}.json"
    names = (
        import_closure.load(told).files if str(told) in deps and told.is_file() else import_closure.file_digests(script)
    )
    return [str(script.parents[1] / name) for name in names]


def _inputs(options: dict) -> tuple[list[str], set[str]]:
    """The verified inputs that the stage has an option for, which was not given by hand; and the folders of all inputs."""
    if "inputs" not in options:
        return [], set()
    try:
        entries = json.loads(options["inputs"].read_text(encoding="utf-8"))["inputs"]
        places = {
            name: [
                os.path.normpath(options["inputs"].parent / each["path"])
                for each in (entry if isinstance(entry, list) else [entry])
            ]
            for name, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [], set()  # the stage says what is wrong with it, if it needs it
    wanted = {option + part for option, value in options.items() if value is None for part in PARTS}
    files = [file for name in wanted & places.keys() for file in places[name]]
    return files, {os.path.dirname(file) for each in places.values() for file in each}


def _indexes(options: dict, inputs: list[str]) -> list[Path]:
    """The index of the tars' members is kept beside their folder (danbooru.members): read, and written where it is not
    current.
    """
    folders = (
        {options["tars"]} if options.get("tars") else {Path(file).parent for file in inputs if file.endswith(".tar")}
    )
    return [folder.resolve().with_suffix(".members.parquet") for folder in folders] if "tars" in options else []


def _interpreter() -> set[str]:
    libraries = {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    own = {site.getusersitepackages()} if site.ENABLE_USER_SITE else set()
    return libraries | own | {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}


def _homes() -> set[str]:
    """As the environment says, and as the system does; a user in a container may be unknown to it."""
    try:
        return {os.path.expanduser("~"), pwd.getpwuid(os.getuid()).pw_dir}
    except KeyError:
        return {os.path.expanduser("~")}


def _pinned(recipe: Recipe, folder: str) -> list[str]:
    """The files of file:// pins; of a span of files their folder."""
    every = [
        pin.url for each in recipe.download.inputs.values() for pin in (each if isinstance(each, list) else [each])
    ]
    urls = [url.removeprefix("file://") for url in every if url.startswith("file://")]
    return [os.path.join(folder, os.path.dirname(url) if "{" in url else url) for url in urls]


def _network(stage: str, options: dict, recipe: Recipe) -> str:
    if stage == "download":
        return "any"
    return "loopback" if "ranks" in options and (options["ranks"] or recipe.execution.ranks) > 1 else "none"
