"""The release's training, precision and preset at a size that a CPU computes in a second: two lanes of one picture."""

from pathlib import Path

import gpu_check
from kohaku_delta import params
from kohaku_delta.params import Recipe

ROOT = Path(__file__).resolve().parents[2]


def recipe() -> Recipe:
    """For models of tiny_sdxl.CONFIGS: 64 × 64 pixels, 75 tokens, no warm-up."""
    release = gpu_check.check_recipe(params.load(ROOT / "params.yaml"))
    return release.model_copy(
        update={
            "schedule": release.schedule.model_copy(update={"batch_size": 1, "micro_batches": 2, "lanes": 2}),
            "model": release.model.model_copy(update={"side": 64}),
            "train": release.train.model_copy(update={"max_token_length": 75}),
        }
    )
