"""Downloads and verifies the inputs of a recipe, with whole tars or only the images that some stage reads.

With download.images: selected the database comes first, then the posts are drawn from it as the select stage draws
them, and only their files and those of the preview's held-out posts are downloaded. They are at the same offsets as in
the whole tars, so every later stage does the same with either.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kohaku_delta import paths
from kohaku_delta.danbooru import partial_download, schema
from kohaku_delta.danbooru.database import Database
from kohaku_delta.danbooru.tars import tars_by_number
from kohaku_delta.dataset import selection
from kohaku_delta.errors import UserError
from kohaku_delta.hub import mirror, pins
from kohaku_delta.params import Recipe


def fetch_inputs(recipe: Recipe, folder: Path, others: Sequence[Path] = ()) -> dict:
    """Downloads and verifies the inputs of a recipe; returns the entries of inputs.json. folder: that of params.yaml.
    others: mirrors that are only read.
    """
    download = recipe.download
    unused = {"delta_base"} if recipe.merge.start == "merge" else {"gamma", "beta"}
    check_tars(recipe, folder)
    _require_user_files(recipe, folder)
    if download.images == "all":
        return mirror.resolve_inputs(download, folder, unused | {"index"}, others)
    for name in ("database", "tars", "index"):
        if name not in download.inputs:
            raise UserError(
                f"download.images is selected, but download.inputs has no {name}. "
                "Add it to params.yaml, or set download.images to all."
            )
    tars = [
        pin
        for span in _as_list(download.inputs["tars"])
        for pin in pins.expand_span(span, paths.pin_list_path(folder, "tars"))
    ]
    if any(not pin.url.startswith("hf://") or pins.hub_file(pin).revision is None for pin in tars):
        raise UserError(
            "download.images is selected, but not all of download.inputs.tars are hf://…@revision/…. "
            "Pin them (`kohaku-delta pin`), or set images to all."
        )
    entries = mirror.resolve_inputs(download, folder, unused | {"tars"}, others)
    indexes = {Path(entry["path"]).stem: folder / entry["path"] for entry in _as_list(entries["index"])}
    database = Database(folder / entries["database"]["path"])
    schema.check_schema(database)
    posts = needed_post_ids(database, recipe)
    entries["tars"] = [
        entry | {"path": mirror.manifest_path(Path(entry["path"]), folder, download.mirror)}
        for entry in partial_download.fetch_members(tars, indexes, folder / download.mirror, posts)
    ]
    return entries


def check_tars(recipe: Recipe, folder: Path) -> None:
    """Raises UserError if the filter stage would refuse the tars by their names or folders. folder: that of
    params.yaml. Tars of a hub need not exist yet; a local one that does not exist is reported when it is verified.
    """
    kept = folder / recipe.download.mirror / ("selected" if recipe.download.images == "selected" else "")
    paths = []
    for pin in _as_list(recipe.download.inputs.get("tars", [])):
        for each in pins.expand_span(pin.model_copy(update={"sha256": None}), Path()):  # every file of the span
            local = each.url.startswith("file://")
            path = folder / each.url.removeprefix("file://") if local else kept / pins.hub_file(each).path
            if local and not path.is_file():
                return
            paths.append(Path(os.path.normpath(path)))
    tars_by_number(paths)


def _require_user_files(recipe: Recipe, folder: Path) -> None:
    """Raises UserError at once, naming the alternative, if a parent is missing that only the user can supply."""
    for name in ("gamma", "beta") if recipe.merge.start == "merge" else ():
        for pin in _as_list(recipe.download.inputs.get(name, [])):
            path = folder / pin.url.removeprefix("file://")
            if pin.url.startswith("file://") and not path.is_file():
                raise UserError(
                    f"{path} does not exist: {name} is supplied by you ({pins.pin_strength(pin)}). "
                    "Put it there, or start without it (merge.start: published)."
                )


def needed_post_ids(database: Database, recipe: Recipe) -> np.ndarray:
    """Ids of the posts whose images some stage reads: selected, or held out for the preview."""
    ids, selected = database.post_ids(), selection.select(database, recipe.selection)["post_id"].to_numpy()
    return np.concatenate([selected, selection.held_out(ids, selected, recipe.preview.seed, recipe.preview.held_out)])


def _as_list(one) -> list:
    return one if isinstance(one, list) else [one]
