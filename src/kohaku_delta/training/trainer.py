"""Invariant: one rank from declared files to the LoKr; rank 0 alone writes, and only when the last step is made.

Order: numerics held → models and adapter built from the base → state taken up → steps → LoKr, journal, curves. A step's
time, throughput and memory go to `log.csv` in the work folder, which nothing depends on.
"""

import os
import resource
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from tqdm import tqdm

from kohaku_delta import atomic_files, numerics
from kohaku_delta.danbooru import tars as tar_files
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.formats.hashing import hash_file
from kohaku_delta.hub import inputs_manifest as hub_inputs
from kohaku_delta.params import Recipe
from kohaku_delta.sdxl.tokenizer import ClipTokenizer

CURVES = "step,loss,gradient_norm,learning_rate_unet,learning_rate_text\n"


LOG = "step,seconds,images_per_second,peak_mib,ranks\n"


def result_parameters(recipe: Recipe) -> dict:
    """The parameters that move bits: {section.key: value}, as YAML knows them."""
    sections = {
        "schedule": recipe.schedule.model_dump(),
        "lokr": recipe.lokr.model_dump(),
        "model": recipe.model.model_dump(),
    }
    sections |= {"train": recipe.train.model_dump(), "caption": {"separator": recipe.caption.separator}}
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def run_dependencies(recipe: Recipe, files: dict[str, Path], texts: list[Path], tars: list[Path]) -> dict[str, str]:
    """Digests of all that decides the result: files, code, parameters that move bits, numerics, libraries. Of tars
    given by hand, names and sizes.
    """
    from kohaku_delta.training import checkpointing

    return {
        **{name: hash_file(files[name]) for name in ("base", "posts", "captions", "schedule")},
        **checkpointing.loaded_code_digests(recipe.requirements),
        **{name: str(value) for name, value in result_parameters(recipe).items()},
        "tokenizers": str([hash_file(path) for path in texts]),
        "tars": str(
            [(path.name, path.stat().st_size) for path in tars]
            if files["tars"]
            else hub_inputs.sha256s(files["inputs"], "tars")
        ),
        "numerics": str(sorted(numerics.describe(recipe.train.device).items())),
    }


def load_tokenizers(files: dict[str, Path]) -> tuple[list[Path], tuple]:
    """Both tokenizers, and the four files that they were made of."""
    pairs = [hub_inputs.tokenizer(files["inputs"], name, files[name]) for name in ("tokenizer", "tokenizer_2")]
    return [path for pair in pairs for path in pair], tuple(ClipTokenizer(*pair) for pair in pairs)


def tar_paths(files: dict[str, Path]) -> dict[int, Path]:
    """The tars by number: of the folder given by hand, or of the verified inputs."""
    return (
        tar_files.tars_in(files["tars"])
        if files["tars"]
        else tar_files.tars_by_number(hub_inputs.paths(files["inputs"], "tars"))
    )


def load_sdxl(recipe: Recipe, checkpoint: Path, tokenizers: tuple, device: str, precision, form=None):
    """The model of a checkpoint, ready for losses; `form`: how conditions reach the U-Net (None: as the recipe trains).
    Refuses tokenizers with more tokens than the text encoders have embeddings.
    """
    from kohaku_delta.sdxl import model_loading
    from kohaku_delta.training.sdxl_model import ConditioningForm, Sdxl

    models = model_loading.load(checkpoint, recipe.model, dtype=precision)
    for name, tokens in zip(("te1", "te2"), tokenizers):
        if len(tokens) > models[name].config.vocab_size:
            raise UserError(
                f"{checkpoint}: text encoder {name[-1]} has {models[name].config.vocab_size} token embeddings and its tokenizer {len(tokens)} tokens. They are of different models."
            )
    models["vae"].float()
    models = {name: model.to(device) for name, model in models.items()}
    form = form or ConditioningForm.of(recipe.train)
    return Sdxl(
        models,
        tokenizers[1].eos_token_id,
        recipe.model.vae_scaling_factor,
        recipe.train.min_snr_gamma,
        device,
        precision,
        form,
    )


def latent_step(model) -> int:
    """Pixels a latent: 8 for SDXL's VAE."""
    return 2 ** (len(model.models["vae"].config.block_out_channels) - 1)


def build_context(recipe: Recipe, files: dict[str, Path], texts: tuple, places: dict[int, Path], device: str):
    """Model, adapter, source and schedule on a device, from declared files; the journal's header. Refuses a run without
    tars.
    """
    import torch

    from kohaku_delta.formats import safetensors_io
    from kohaku_delta.training.batch_builder import BatchBuilder
    from kohaku_delta.training.lokr_adapter import LokrAdapter
    from kohaku_delta.training.training_loop import TrainingContext

    if not places:
        raise UserError(f"{files['tars']} holds no tar (data-0000.tar …). Name the folder of the tars with --tars.")
    model = load_sdxl(recipe, files["base"], texts, device, getattr(torch, recipe.train.precision))
    if recipe.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    with safetensors_io.open_file(files["base"]) as base:
        digest = base.digest()
    adapter = LokrAdapter(model.models, recipe.lokr, getattr(torch, recipe.train.weights)).to(device)
    source = BatchBuilder(
        parquet.read(files["posts"], ["post_id", "tar", "offset", "size", "width", "height"]),
        parquet.read(files["captions"], ["post_id", "caption"]),
        next(iter(places.values())).parent,
        texts,
        recipe.train,
        recipe.caption.separator,
        latent_step(model),
    )
    return TrainingContext(
        model,
        adapter,
        source,
        parquet.read(files["schedule"]),
        {"base": digest, "parameters": result_parameters(recipe)},
    )


def train(recipe: Recipe, files: dict[str, Path], work: Path) -> str | None:
    """Runs this process's rank to the end. Returns the summary line on rank 0, None on the others."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = recipe.train.device
    numerics.enforce(device)
    import torch
    import torch.distributed as dist

    from kohaku_delta.training import checkpointing, distributed_state, gradient_reduction
    from kohaku_delta.training.training_loop import TrainingLoop

    gradient_reduction.lanes_of_rank(recipe.schedule.lanes, rank, ranks)
    if device == "cuda":
        card = int(os.environ.get("LOCAL_RANK", 0))
        if card >= torch.cuda.device_count():
            raise UserError(
                f"This machine has {torch.cuda.device_count()} GPUs, and rank {rank} wants a further one. Name fewer ranks (--ranks; torchrun's --nproc-per-node)."
            )
        torch.cuda.set_device(card)
    text_files, texts = load_tokenizers(files)
    places = tar_paths(files)
    with checkpointing.locked(work, rank):
        made = build_context(recipe, files, texts, places, device)
        steps = int(made.schedule["step"][-1].as_py()) + 1
        depends = run_dependencies(recipe, files, text_files, list(places.values()))
        folder = checkpointing.run_folder(work, depends, steps, rank)
        if ranks > 1:
            try:
                dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(minutes=10))
            except RuntimeError as error:
                raise UserError(
                    f"Rank {rank} did not find the others ({str(error).splitlines()[0]}). Look at what they said, on every machine."
                ) from None
            distributed_state.require_same_run(depends, ranks, device)
        loop = TrainingLoop(recipe, made, folder, rank, ranks)
        done = 0
        images = np.add.reduceat(pc.list_value_length(made.schedule["visits"]).to_numpy(), loop.starts[:-1])
        with tqdm(total=loop.steps, desc="train", unit="step", disable=None if rank == 0 else True) as bar:
            for done, loss, seconds in loop.run():
                bar.update(done - bar.n)
                if rank == 0:
                    speed = images[done - 1] / seconds
                    bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{speed:.2f}")
                    append_log(
                        folder / "log.csv", f"{done - 1},{seconds:.3f},{speed:.3f},{peak_memory_mib(device)},{ranks}\n"
                    )
        if ranks > 1:
            dist.destroy_process_group()
        if loop.stopping and done < loop.steps:
            if rank:
                raise SystemExit(1)
            raise UserError(
                f"Stopped after step {done} of {loop.steps}, and saved. Run the stage again to go on from there."
            )
        if rank:
            return None
        tar_paths(
            files
        )  # compared again: nothing is written of pictures that were changed during the weeks of a training
        rows = loop.journal.rows
        written = loop.write(files["out"])
        loop.journal.lokr = written.digest
        loop.journal.write(files["journal"])
        with atomic_files.atomic_write(files["curves"], "w") as file:
            file.write(CURVES)
            for row in rows:
                mean = sum(row["losses"]) / len(row["losses"])
                file.write(
                    f"{row['step']},{mean!r},{row['gradient_norm']!r},{row['learning_rate_unet']!r},{row['learning_rate_text']!r}\n"
                )
        return f"{len(rows):,} steps, {len(made.adapter.entries):,} LoKr entries, sha256 {written.sha256[:16]}… → {files['out']}, {files['journal']}"


def append_log(path: Path, line: str) -> None:
    """Appends what varies from host to host; the first line names the columns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(line if file.tell() else LOG + line)


def peak_memory_mib(device: str) -> int:
    """Peak memory so far, MiB: of the card, or of this process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
