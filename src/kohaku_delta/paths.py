"""The names of everything that a recipe's pipeline writes, relative to the recipe's folder (the one with params.yaml).

Strings, not Paths: DVC's files hold the same strings, and the stages use them as the defaults of their options.
"""

import re
from pathlib import Path

BUILD = "build"

INPUTS = "build/inputs.json"  # download: the verified inputs and where they lie
SELECTION = "build/selection.parquet"  # select
POSTS = "build/posts.parquet"  # filter
DROPPED = "build/dropped.parquet"  # filter
CAPTIONS = "build/captions.parquet"  # caption
DATASET = "build/dataset.json"  # statistics
STATISTICS = "build/statistics"  # statistics: folder of plots
ARTISTS = "build/artists-kxl-delta.json"  # caption, as published
CHARACTERS = "build/characters-kxl-delta.json"  # caption, as published
BASE = "build/delta-base.safetensors"  # merge
SCHEDULE = "build/schedule.parquet"  # schedule
BUCKETS = "build/bucket.txt"  # schedule, as published
LOKR = "build/delta-lokr.safetensors"  # train
MILESTONES = "build/milestones"  # train: folder of a LoKr every train.milestone_every steps
JOURNAL = "build/journal.parquet"  # train
CURVES = "build/curves.csv"  # train
FINAL = "build/kohaku-xl-delta.safetensors"  # bake: the release's checkpoint
DIFFUSERS = "build/diffusers"  # export: folder
PREVIEW = "build/preview.png"  # preview
SAMPLES = "build/samples"  # preview: folder of its pictures, with their settings
HELD_OUT = "build/held-out.json"  # preview: loss on posts that were not trained on
MILESTONES_CSV = "build/milestones.csv"  # milestones: held-out loss of base, milestones and final model
MILESTONES_PNG = "build/milestones.png"  # milestones: the preview's prompts as each of them draws them

CODE = "build/code"  # code: a description of each stage's code, <stage>.json
RECORDS = "build/records"  # every stage: a record of its run; no DVC output


def milestone_name(step: int) -> str:
    """The file of the LoKr after `step` steps, in build/milestones and in the run's work folder."""
    return f"delta-lokr-step{step:08d}.safetensors"


def is_milestone_name(name: str) -> bool:
    """Whether a file has the name of such a LoKr."""
    return re.fullmatch(r"delta-lokr-step\d{8,}\.safetensors", name) is not None


def stamps_path(inputs: Path) -> Path:
    """Where the stamps of the verified inputs are kept: beside inputs.json, as inputs.verified.json."""
    return inputs.with_name(f"{inputs.stem}.verified.json")


def pin_list_path(folder: Path, name: str, place: int = 0) -> Path:
    """The list of the pins of the input `name`, beside the params.yaml of `folder`: pins-tars.csv, and pins-tars-2.csv
    for the second pin of the input (place 1).
    """
    return folder / f"pins-{name}{f'-{place + 1}' if place else ''}.csv"
