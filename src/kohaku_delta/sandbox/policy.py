"""What a stage may open: it follows from its entry in dvc.yaml, its code, params.yaml, inputs.json and its options.

A default path counts only if the stage's entry in dvc.yaml names it; a path given by hand counts as it is, and outputs
may also be beside one. The inputs of a stage are those that it has an option for. Paths are absolute, with links in
their folders resolved.
"""

import json
import os
import pwd
import re
import site
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from kohaku_delta import paths
from kohaku_delta.params import Recipe, load
from kohaku_delta.provenance import dvc_yaml, import_closure
from kohaku_delta.yaml_file import read_yaml

UNFINISHED = re.compile(r"/\.([^/]+)\.\d+\.aside(?=/|$)")  # the names of atomic_files for what is not complete yet
DECODING = ("filter", "milestones", "preview")  # they keep, beside the tars, which images could be decoded
INPUT_SUFFIXES = ("", "_vocab", "_merges", "_index")  # inputs of one option: a tokenizer and the tars are several files


@dataclass(frozen=True)
class StagePolicy:
    stage: str
    allowed: frozenset[str]  # files, and folders with everything in them
    watched: frozenset[str]  # the repository, the recipe's folder, the mirror, the home directory; the rest is open
    listed: frozenset[str]  # folders that may be listed: where Python looks for modules
    written: frozenset[str]  # folders of outputs and of the training's state: new temporary files may be made there
    changed: frozenset[str]  # other folders in which declared files are made: for the kernel's rules alone
    emptied: frozenset[str]  # folders from which an empty folder is removed: the stage's own temporary folder
    libraries: tuple[str, ...]  # the interpreter's folders: beginnings of paths that need no further check
    network: str  # "none" | "loopback" (between ranks) | "any"

    def may_open(self, path: str) -> bool:
        """Whether the file (an absolute path) is declared, or not watched. The nearest known folder decides."""
        while path not in self.allowed:
            if path in self.watched:
                return False
            if path == "/":
                return True
            path = os.path.dirname(path)
        return True


def canonical_path(path, follow: bool = True) -> str:
    """The path by which a policy knows a file: an unfinished output as the output, a compiled module as its source.
    follow: of a link, the file that it leads to.
    """
    path = (
        os.path.realpath(path)
        if follow
        else os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    )
    if path.endswith(".aside") or ".aside/" in path:
        path = UNFINISHED.sub(r"/\1", path)
    folder, name = os.path.split(path)
    if folder.endswith("/__pycache__"):
        return f"{os.path.dirname(folder)}/{name.split('.')[0]}.py"
    if sys.pycache_prefix and name.endswith(".pyc") and folder.startswith(prefix := _real_path(sys.pycache_prefix)):
        return f"{folder.removeprefix(prefix)}/{name.split('.')[0]}.py"
    return path


@cache
def _real_path(path: str) -> str:
    return os.path.realpath(path)


def _link_and_target(path: str | Path) -> set[str]:
    """The path itself, and its target if it is a link."""
    path = os.path.abspath(path)
    own = os.path.join(_real_path(os.path.dirname(path)), os.path.basename(path)) if path != "/" else path
    return {own, os.path.realpath(path)} if os.path.islink(path) else {own}


def stage_entry(script: Path) -> dict[str, Any] | None:
    """The entry of dvc.yaml for the stage that `script` is; None if it is no stage."""
    pipeline = script.parents[1] / dvc_yaml.PIPELINE
    if script.parent.name != "stages" or not pipeline.is_file():
        return None
    return read_yaml(pipeline)["stages"].get(script.stem)


def policy_for(script: Path, entry: dict[str, Any], context: click.Context) -> StagePolicy:
    """Everything that the stage may open when run with the options of `context`. entry: that of dvc.yaml."""
    root, stage, options = script.parents[1], script.stem, context.params
    recipe = load(options["params"])
    recipe_folder = os.path.dirname(os.path.realpath(options["params"]))
    mirror = os.path.join(recipe_folder, recipe.download.mirror)
    deps = dvc_yaml.entry_paths(entry.get("deps") or [])
    outs = [path for kind in ("outs", "metrics", "plots") for path in dvc_yaml.entry_paths(entry.get(kind) or [])]
    code = [dep.replace("${root}", str(root)) for dep in deps if dep.startswith("${root}")] + _code(script, deps)
    libraries = _interpreter_folders()
    inputs, input_folders = _inputs(options)
    written = {options[option.name].parent for option in context.command.params if str(option.default) in outs}
    if stage == "code":  # the only stage whose option names the folder of its outputs
        written.add(options["out"])

    allowed: list[str | Path] = [options["params"], root / dvc_yaml.PIPELINE, *code, *map(cache_from_source, code)]
    allowed += [
        value
        for name, values in options.items()
        for value in (values if isinstance(values, tuple) else (values,))
        if isinstance(value, Path)
        and (context.get_parameter_source(name) is not ParameterSource.DEFAULT or str(value) in (*deps, *outs))
    ]
    # DVC may link the files of a folder too, as it keeps them (`cache.type: symlink`)
    allowed += [link for path in list(allowed) if os.path.isdir(path) for link in _links_in(str(path))]
    # the lists of the caption stage, for example, lie beside the captions, wherever these go
    allowed += [folder / Path(out).name for folder in written for out in outs]
    changed = {tempfile.gettempdir(), *map(os.path.dirname, map(cache_from_source, code))}
    changed |= {sys.pycache_prefix} if sys.pycache_prefix else set()
    changed |= {paths.RECORDS} if os.path.isdir(paths.RECORDS) else set()
    changed |= _folders_of_other_outputs(recipe, context)
    indexes = _tar_indexes(options, inputs)
    # a rule of the kernel for the folder of the index opens all that is in it to be changed
    changed |= {str(index.parent) for index in indexes if stage == "filter" or not index.exists()}
    allowed += [*inputs, *indexes]
    if stage in DECODING:
        decoded = [index.with_suffix(".decoded") for index in (options.get("index"), *indexes) if index]
        written |= set(decoded)
        allowed += decoded
    allowed += [*libraries, tempfile.gettempdir(), *filter(None, [sys.pycache_prefix])]
    # what the record of the run is made of, and where it is written
    allowed += [root / "requirements" / f"{recipe.requirements}.txt", f"{paths.CODE}/{stage}.json"]
    allowed.append(paths.RECORDS)
    if "inputs" in options:
        # says whether an input must be hashed again, decides no bytes
        allowed.append(paths.stamps_path(options["inputs"]))
        changed.add(str(options["inputs"].parent))
    if "work" in options:
        work = options["work"] or Path(recipe.execution.work)
        written.add(work)
        allowed.append(work)
    if stage == "download":
        hub_files, hub_folders = _hub_configuration()
        written |= {Path(mirror), *hub_folders}
        supplied = os.path.join(recipe_folder, recipe.supplied)
        allowed += [paths.stamps_path(options["out"]), supplied, *_links_in(supplied)]
        links = _links_in(mirror)
        changed |= {link for link in links if os.path.exists(link)}
        allowed += [mirror, *links, *hub_files, *hub_folders, *_pinned_files(recipe, recipe_folder)]

    watched = _real_paths([root, recipe_folder, mirror, *input_folders, *_home_folders()]) - {"/"}
    return StagePolicy(
        stage,
        frozenset(path for item in allowed for path in _link_and_target(item)),
        watched,
        _real_paths([*sys.path, *map(os.path.dirname, code)]),
        _real_paths(written),
        _real_paths(changed),
        frozenset({os.path.dirname(_real_path(tempfile.gettempdir()))}),
        tuple(f"{path}/" for path in sorted(libraries) if not any(f"{top}/".startswith(f"{path}/") for top in watched)),
        _network(stage, options, recipe),
    )


def _folders_of_other_outputs(recipe: Recipe, context: click.Context) -> set[str]:
    """The folders of files that dvc.yaml does not name and that an option places: another index of the tars."""
    return {
        os.path.dirname(os.path.abspath(value))
        for option in context.command.params
        if option.name
        and option.default is None
        and isinstance(value := context.params[option.name], Path)
        and not any(option.name + suffix in recipe.download.inputs for suffix in INPUT_SUFFIXES)
    }


def _real_paths(files: Iterable[str | Path]) -> frozenset[str]:
    return frozenset(_real_path(str(file)) for file in files)


def _code(script: Path, deps: list[str]) -> list[str]:
    """The files of the stage's code: those of build/code/<stage>.json, or those of its imports if dvc.yaml does not
    name that file, or it does not exist yet.
    """
    description = Path(paths.CODE) / f"{script.stem}.json"
    is_described = str(description) in deps and description.is_file()
    files = import_closure.load(description).files if is_described else import_closure.file_digests(script)
    return [str(script.parents[1] / file) for file in files]


def _inputs(options: dict[str, Any]) -> tuple[list[str], set[str]]:
    """The verified inputs that the stage has an unused option for, and the folders of all inputs."""
    if "inputs" not in options:
        return [], set()
    try:
        entries = json.loads(options["inputs"].read_text(encoding="utf-8"))["inputs"]
        listed = {
            name: [
                os.path.normpath(options["inputs"].parent / file["path"])
                for file in (entry if isinstance(entry, list) else [entry])
            ]
            for name, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [], set()  # the stage itself reports what is wrong with the file, if it needs it
    names = {option + suffix for option, value in options.items() if value is None for suffix in INPUT_SUFFIXES}
    files = [file for name in names & listed.keys() for file in listed[name]]
    return files, {os.path.dirname(file) for entry in listed.values() for file in entry}


def _tar_indexes(options: dict[str, Any], inputs: list[str]) -> list[Path]:
    """The index of the tars beside their folder, which the stage writes if it is not current."""
    if "tars" not in options:
        return []
    folders = {options["tars"]} if options["tars"] else {Path(file).parent for file in inputs if file.endswith(".tar")}
    return [folder.resolve().with_suffix(".members.parquet") for folder in folders]


def _interpreter_folders() -> set[str]:
    libraries = {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    user = {site.getusersitepackages()} if site.ENABLE_USER_SITE else set()
    return libraries | user | {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}


def _home_folders() -> set[str]:
    """According to the environment and to the system, which may not know the user of a container."""
    try:
        return {os.path.expanduser("~"), pwd.getpwuid(os.getuid()).pw_dir}
    except KeyError:
        return {os.path.expanduser("~")}


def _hub_configuration() -> tuple[list[str], list[Path]]:
    """What huggingface_hub and its HTTP client read as their configuration (their documents name the variables): files,
    and the folder where the token and notes are kept. It decides who may download; what arrives is verified by sha256.
    """
    from huggingface_hub import constants

    named = [os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "NETRC", "OPENSSL_CONF")]
    tokens = [constants.HF_TOKEN_PATH, constants.HF_STORED_TOKENS_PATH, f"{constants.HF_STORED_TOKENS_PATH}.lock"]
    files = [os.path.expanduser("~/.netrc"), *tokens, constants.HF_HUB_CACHE, *filter(None, named)]
    certificates = os.environ.get("SSL_CERT_DIR")
    return files + (_links_in(certificates) if certificates else []), [Path(constants.HF_HOME)]


def _links_in(folder: str) -> list[str]:
    """The links to files and folders in a folder, at any depth, and in the folders that they lead to: what they lead to
    may be opened too.
    """
    links: list[str] = []
    folders, known = [os.path.realpath(folder)], set()
    while folders:
        known.add(start := folders.pop())
        for top, inner, names in os.walk(start):
            found = [path for name in inner + names if os.path.islink(path := f"{top}/{name}")]
            links += found
            folders += {os.path.realpath(path) for path in found if os.path.isdir(path)} - known
    return links


def _pinned_files(recipe: Recipe, folder: str) -> list[str]:
    """The files of file:// pins (of a span of files, their folder), and the lists of pins."""
    download = recipe.download
    files = [pin.local_path for _, pin in download.all_pins if pin.local_path]
    lists = [
        str(paths.pin_list_path(Path(folder), name, place))
        for name in download.inputs
        for place in range(len(download.pins(name)))
    ]
    return [os.path.join(folder, os.path.dirname(path) if "{" in path else path) for path in files] + lists


def _network(stage: str, options: dict[str, Any], recipe: Recipe) -> str:
    if stage == "download":
        return "any"
    return "loopback" if "ranks" in options and (options["ranks"] or recipe.execution.ranks) > 1 else "none"
