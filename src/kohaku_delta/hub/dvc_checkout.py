"""Links the recipe's local inputs, and the trainings' states, into a temporary checkout of DVC (`dvc exp run --temp`,
`--queue`), so that a stage finds them there as in the repository.

Such a checkout holds what git tracks and the outputs of the stages, but neither the mirror nor the `file://` inputs
outside of it. They are linked, not copied, and new downloads go to the one mirror. DVC removes the checkout when the
experiment ends or fails: a training's states, which are in the repository's folder, outlive it.
"""

import os
from pathlib import Path

from kohaku_delta import params as recipes

# DVC sets it for every stage; in a temporary checkout to the folder of the experiment's repository
REPOSITORY = "DVC_ROOT"


def link_inputs(params: Path, with_work: bool = False) -> None:
    """Links what is missing here and exists in the repository. params: the recipe's params.yaml; with_work: also the
    folder of the training's states, which is made. Does nothing outside of a temporary checkout.
    """
    checkout = next((folder for folder in params.resolve().parents if (folder / ".dvc").is_dir()), None)
    repository = os.environ.get(REPOSITORY)
    if checkout is None or not repository or Path(repository).resolve() == checkout:
        return
    recipe = recipes.load(params)
    download, work = recipe.download, recipe.execution.work
    local = [pin.local_path for _, pin in download.all_pins if pin.local_path]
    for name in (download.mirror, *local, *([work] if with_work else [])):
        path = Path(os.path.normpath(params.resolve().parent / name))
        if not path.is_relative_to(checkout) or os.path.lexists(path):
            continue
        original = Path(repository) / path.relative_to(checkout)
        if name == work:
            original.mkdir(parents=True, exist_ok=True)
        if original.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(original.resolve(), target_is_directory=original.is_dir())
