"""Downloads and verifies the inputs of a recipe, with whole tars or only the images that some stage reads.

If the recipe names posts.json instead of a database, the database is made from it here, and inputs.json lists both.
Tars of several folders are linked into one.

With download.images: selected the database comes first, then the posts are drawn from it as the select stage draws
them, and only their files and those of the preview's held-out posts are downloaded. They are at the same offsets as in
the whole tars, so every later stage does the same with either.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from kohaku_delta import paths
from kohaku_delta.danbooru import partial_download, posts_json, schema, tar_links, tars
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import selection
from kohaku_delta.errors import UserError
from kohaku_delta.hub import inputs_manifest, mirror, pins
from kohaku_delta.params import Download, Recipe
from kohaku_delta.printing import format_some


def fetch_inputs(recipe: Recipe, folder: Path, other_mirrors: Sequence[Path] = ()) -> dict:
    """Downloads and verifies the inputs of a recipe; returns the entries of inputs.json. folder: that of params.yaml.
    other_mirrors: only read.
    """
    download = recipe.download
    unread = pins.unread_inputs(recipe)
    check_tars(recipe, folder)
    _require_user_files(recipe, folder)
    _require_main_tars(recipe, folder)
    if download.images == "all":
        entries = mirror.resolve_inputs(download, folder, unread, other_mirrors)
        entries |= _converted_posts(entries, folder, download)
        return entries | _linked_tars(entries, folder, download)
    source = "posts" if "posts" in download.inputs else "database"
    for name in (source, "tars", "index"):
        if name not in download.inputs:
            raise UserError(
                f"download.images is selected, but download.inputs has no {name}. "
                "Add it to params.yaml, or set download.images to all."
            )
    pinned = pins.expand_input("tars", download.inputs["tars"], folder)
    if any(pin.local_path or pins.hub_file(pin).revision is None for pin in pinned):
        raise UserError(
            "download.images is selected, but not all of download.inputs.tars are hf://…@revision/…. "
            "Pin them (`kohaku-delta pin`), or set images to all."
        )
    entries = mirror.resolve_inputs(download, folder, unread | {"tars"}, other_mirrors)
    entries |= _converted_posts(entries, folder, download)
    indexes = _indexes_by_name(entries["index"], folder)
    numbers = {int(match[1]) for pin in pinned if (match := tars.NAME.fullmatch(pin.url.rpartition("/")[2]))}
    database = Database(folder / entries["database"]["path"])
    schema.check_schema(database)
    posts = needed_post_ids(database, recipe, numbers)
    entries["tars"] = [
        entry | {"path": mirror.manifest_path(Path(entry["path"]), folder, download.mirror)}
        for entry in partial_download.fetch_members(pinned, indexes, folder / download.mirror, posts)
    ]
    return entries | _linked_tars(entries, folder, download)


def _converted_posts(entries: dict, folder: Path, download: Download) -> dict:
    """The entry of the database that is made from posts.json, if the recipe names one."""
    if "posts" not in entries:
        return {}
    posts = entries["posts"]
    path, found = posts_json.converted_database(folder / posts["path"], posts["sha256"], folder / download.mirror)
    entry = {
        "path": mirror.manifest_path(path, folder, download.mirror),
        "bytes": found.stamp.bytes,
        "sha256": found.sha256,
        "url": f"{posts['url']}#{path.name}",
        "pinned": inputs_manifest.CONVERTED,
        "stamp": found.stamp,
    }
    return {"database": entry}


def _linked_tars(entries: dict, folder: Path, download: Download) -> dict:
    """The entries of the tars, with the paths of links if they are in several folders."""
    listed = _as_list(entries.get("tars", []))
    files, urls = [folder / entry["path"] for entry in listed], [entry["url"] for entry in listed]
    links = tar_links.link_into_one_folder(files, urls, folder / download.mirror)
    if links == files:
        return {}
    written = [mirror.manifest_path(link, folder, download.mirror) for link in links]
    return {"tars": [entry | {"path": path} for entry, path in zip(listed, written, strict=True)]}


def _indexes_by_name(index, folder: Path) -> dict[str, Path]:
    """The public indexes by the name of their tar, without extension: original/data-0000 as in their repository, and
    data-0000 if no other has it.
    """
    entries = [(PurePosixPath(entry["url"]).with_suffix(""), folder / entry["path"]) for entry in _as_list(index)]
    counts = Counter(name.name for name, _ in entries)
    short = {name.name: path for name, path in entries if counts[name.name] == 1}
    whole = {"/".join(name.parts[-length:]): path for name, path in entries for length in (2, 3)}
    return short | whole


def check_tars(recipe: Recipe, folder: Path) -> None:
    """Raises UserError if the filter stage would refuse the tars by their names. folder: that of
    params.yaml. Tars of a hub need not exist yet; a local one that does not exist is reported when it is verified.
    """
    kept = folder / recipe.download.mirror / ("selected" if recipe.download.images == "selected" else "")
    files = []
    for pin in recipe.download.pins("tars"):
        for each in pins.expand_span(pin.model_copy(update={"sha256": None}), Path()):  # every file of the span
            path = folder / each.local_path if each.local_path else kept / pins.hub_file(each).path
            if each.local_path and not path.is_file():
                return
            files.append(Path(os.path.normpath(path)))
    tar_links.check_names(files)


def _require_user_files(recipe: Recipe, folder: Path) -> None:
    """Raises UserError at once, naming the alternative, if a parent is missing that only the user can supply."""
    for name in ("gamma", "beta") if recipe.merge.start == "merge" else ():
        for pin in recipe.download.pins(name):
            if pin.local_path and not (folder / pin.local_path).is_file():
                raise UserError(
                    f"{folder / pin.local_path} does not exist: {name} is supplied by you ({pins.pin_strength(pin)}). "
                    "Put it there, or start without it (merge.start: published)."
                )


def _require_main_tars(recipe: Recipe, folder: Path) -> None:
    """Raises UserError if a list of pins leaves out a main tar that params.yaml names: its posts would be lost."""
    for place, span in enumerate(recipe.download.pins("tars")):
        pin_list = paths.pin_list_path(folder, "tars", place)
        listed = {pin.url for pin in pins.expand_span(span, pin_list)}
        names = [url.rpartition("/")[2] for url in pins.span_urls(span) if url not in listed]
        absent = [name for name in names if (match := tars.NAME.fullmatch(name)) and int(match[1]) in tars.MAIN]
        if absent:
            raise UserError(
                f"{pin_list} does not list {format_some(absent, 8)}, which {span.url} names: that revision does not "
                "have it, and its posts would be lost. Choose another revision, or name other tars "
                "(download.inputs.tars)."
            )


def needed_post_ids(database: Database, recipe: Recipe, numbers: Iterable[int]) -> np.ndarray:
    """Ids of the posts whose images some stage reads: selected, or held out for the preview. numbers: of the tars."""
    selected, preview = selection.select(database, recipe.selection)["post_id"].to_numpy(), recipe.preview
    candidates = tars.in_main_tars(database.post_ids(), numbers)
    return np.concatenate([selected, selection.held_out(candidates, selected, preview.seed, preview.held_out)])


def _as_list(one) -> list:
    return one if isinstance(one, list) else [one]
