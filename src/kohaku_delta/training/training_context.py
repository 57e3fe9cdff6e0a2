"""The objects that a rank trains with, built from the declared files: model, adapter, batch builder, schedule."""

from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet, safetensors_io
from kohaku_delta.formats.hashing import hash_file
from kohaku_delta.params import NETWORK_WEIGHTS, Recipe
from kohaku_delta.sdxl import model_loading
from kohaku_delta.training import run_inputs
from kohaku_delta.training.batch_builder import BatchBuilder
from kohaku_delta.training.lokr import LokrAdapter
from kohaku_delta.training.run_inputs import Tokenizers
from kohaku_delta.training.sdxl_model import ConditioningForm, Sdxl
from kohaku_delta.weights import lokr_format


class TrainingContext(NamedTuple):
    """What a rank trains with."""

    model: Sdxl
    adapter: LokrAdapter
    builder: BatchBuilder
    schedule: pa.Table
    header: dict  # of the journal

    @property
    def steps(self) -> int:
        return int(self.schedule["step"][-1].as_py()) + 1


def load_sdxl(
    recipe: Recipe,
    checkpoint: Path,
    tokenizers: Tokenizers,
    device: str,
    precision: torch.dtype,
    form: ConditioningForm | None = None,
) -> Sdxl:
    """The model of a checkpoint on a device. `form`: how conditions reach the U-Net; None: as the recipe trains.

    Raises UserError if a tokenizer has more tokens than its text encoder has embeddings.
    """
    models: dict[str, Any] = model_loading.load(checkpoint, recipe.model, dtype=precision)
    for name, tokenizer in zip(("te1", "te2"), tokenizers, strict=True):
        embeddings = models[name].config.vocab_size
        if len(tokenizer) > embeddings:
            raise UserError(
                f"{checkpoint}: text encoder {name[-1]} has {embeddings} token embeddings and its tokenizer "
                f"{len(tokenizer)} tokens. They are of different models."
            )
    models["vae"].float()
    return Sdxl(
        {name: model.to(device) for name, model in models.items()},
        tokenizers[1].eos_token_id,
        recipe.model.vae_scaling_factor,
        recipe.train.min_snr_gamma,
        device,
        precision,
        form or ConditioningForm.of(recipe.train),
    )


def pixels_per_latent(model: Sdxl) -> int:
    """Pixels of a latent's side: 8 for SDXL's VAE (diffusers' vae_scale_factor)."""
    return 2 ** (len(model.models["vae"].config.block_out_channels) - 1)


def build_context(
    recipe: Recipe, files: dict[str, Path], tokenizers: Tokenizers, tars: dict[int, Path], device: str
) -> TrainingContext:
    """Model, adapter, batch builder, schedule and the journal's header, from declared files, on a device.

    Raises UserError if there are no tars, and for a LoKr to start from that is not of this recipe and this base.
    """
    if not tars:
        raise UserError(f"{files['tars']} holds no tar (data-0000.tar …). Name the folder of the tars with --tars.")
    with safetensors_io.open_file(files["base"]) as base:
        base_digest = base.digest()
    header = {"base": base_digest, "parameters": run_inputs.result_parameters(recipe)}
    model = load_sdxl(recipe, files["base"], tokenizers, device, getattr(torch, recipe.train.precision))
    if recipe.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    adapter = LokrAdapter(model.models, recipe.lokr, getattr(torch, recipe.train.weights)).to(device)
    if start := run_inputs.network_weights(files):
        with safetensors_io.open_file(start) as lokr:
            lokr_format.require_base(lokr, base_digest, files["base"])
            adapter.load(lokr, recipe.lokr.alpha)
        header[NETWORK_WEIGHTS] = hash_file(start)
    builder = BatchBuilder(
        parquet.read(files["posts"], ["post_id", "tar", "offset", "size", "width", "height"]),
        parquet.read(files["captions"], ["post_id", "caption"]),
        next(iter(tars.values())).parent,
        tokenizers,
        recipe.train,
        recipe.caption.separator,
        pixels_per_latent(model),
    )
    return TrainingContext(model, adapter, builder, parquet.read(files["schedule"]), header)
