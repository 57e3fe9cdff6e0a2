"""Invariant: a stage that DVC runs in a temporary checkout (`dvc exp run --temp`, `--queue`) finds the recipe's local
inputs as in the repository.

Such a checkout holds what git tracks and the outputs of the stages. The mirror, and what `file://` pins name outside of
it, are neither: they are linked here to the repository's own. Nothing is copied, and what is downloaded goes to the one
mirror.
"""

import os
from pathlib import Path

from kohaku_delta import params as recipes

# DVC sets it for every stage; in a temporary checkout to the folder of the repository that the experiment is of
REPOSITORY = "DVC_ROOT"


def link_inputs(params: Path) -> None:
    """Links what is missing here and lies in the repository. params: the recipe's file. Does nothing outside of a
    temporary checkout.
    """
    here, repository = _dvc_root(params), os.environ.get(REPOSITORY)
    if here is None or not repository or Path(repository).resolve() == here:
        return
    download = recipes.load(params).download
    pins = [pin for each in download.inputs.values() for pin in (each if isinstance(each, list) else [each])]
    for name in (download.mirror, *(pin.url.removeprefix("file://") for pin in pins if pin.url.startswith("file://"))):
        place = Path(os.path.normpath(params.resolve().parent / name))
        if not place.is_relative_to(here) or os.path.lexists(place):
            continue
        other = Path(repository) / place.relative_to(here)
        if other.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(other.resolve(), target_is_directory=other.is_dir())


def _dvc_root(params: Path) -> Path | None:
    """The nearest folder above the recipe that has DVC's own folder."""
    return next((folder for folder in params.resolve().parents if (folder / ".dvc").is_dir()), None)
