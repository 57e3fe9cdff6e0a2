"""Invariant: one rank from declared files to the LoKr; rank 0 alone writes, and only when the last step is made.

Order: numerics held → models and adapter built from the base → state taken up → steps → LoKr, journal, curves.
"""

import os
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from kohaku_delta import atomic, numerics, table
from kohaku_delta.danbooru import tars as tar_files
from kohaku_delta.hub import inputs as hub_inputs
from kohaku_delta.hub.mirror import hashed
from kohaku_delta.params import Recipe
from kohaku_delta.refusal import Refusal

LIBRARIES = ("torch", "diffusers", "transformers", "lycoris-lora", "bitsandbytes", "numpy", "pillow", "opencv-python-headless", "tokenizers")
CURVES = "step,loss,gradient_norm,learning_rate_unet,learning_rate_text\n"


def dependencies(recipe: Recipe, files: dict[str, Path], texts: list[Path], tars: list[Path]) -> dict[str, str]:
    """Digests of all that decides the result: files, parameters that move bits, numerics, libraries. Of the tars, names and sizes."""
    from importlib.metadata import version

    moved = recipe.train.model_dump(exclude={"ranks", "save_every", "keep_states", "work"})
    sections = {"schedule": recipe.schedule, "lokr": recipe.lokr, "model": recipe.model, "separator": recipe.caption.separator, "train": moved}
    return {
        **{name: hashed(files[name]) for name in ("base", "posts", "captions", "schedule")},
        **{name: str(section) for name, section in sections.items()},
        "tokenizers": str([hashed(path) for path in texts]),
        "tars": str([(path.name, path.stat().st_size) for path in tars]),
        "numerics": str(sorted(numerics.contract(recipe.train.device).items())),
        "libraries": str([(name, version(name)) for name in LIBRARIES]),
    }


def tokenizers(files: dict[str, Path]) -> tuple[list[Path], tuple]:
    """Both tokenizers, and the four files that they were made of."""
    from kohaku_delta.training import conditioning

    pairs = [hub_inputs.tokenizer(files["inputs"], name, files[name]) for name in ("tokenizer", "tokenizer_2")]
    return [path for pair in pairs for path in pair], tuple(conditioning.tokenizer(*pair) for pair in pairs)


def tars(files: dict[str, Path]) -> dict[int, Path]:
    """The tars by number: of the folder given by hand, or of the verified inputs."""
    return tar_files.folder(files["tars"]) if files["tars"] else tar_files.numbered(hub_inputs.paths(files["inputs"], "tars"))


def sdxl(recipe: Recipe, checkpoint: Path, tokenizers: tuple, device: str, precision):
    """The model of a checkpoint, ready for losses. Refuses tokenizers with more tokens than the text encoders have embeddings."""
    from kohaku_delta.checkpoint import modules
    from kohaku_delta.training.model import Sdxl

    models = modules.load(checkpoint, recipe.model, dtype=precision)
    for name, tokens in zip(("te1", "te2"), tokenizers):
        if len(tokens) > models[name].config.vocab_size:
            raise Refusal(f"{checkpoint}: text encoder {name[-1]} has {models[name].config.vocab_size} token embeddings and its tokenizer {len(tokens)} tokens. They are of different models.")
    return Sdxl(models, tokenizers[1].eos_token_id, recipe.model.vae_scaling_factor, recipe.train.min_snr_gamma, device, precision)


def latent_step(model) -> int:
    """Pixels a latent: 8 for SDXL's VAE."""
    return 2 ** (len(model.models["vae"].config.block_out_channels) - 1)


def train(recipe: Recipe, files: dict[str, Path], work: Path) -> str | None:
    """Runs this process's rank to the end. Returns the summary line on rank 0, None on the others."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = recipe.train.device
    numerics.hold(device)
    import torch
    import torch.distributed as dist

    from kohaku_delta.checkpoint import lokr, stream
    from kohaku_delta.training import lanes, state
    from kohaku_delta.training.adapter import Adapter
    from kohaku_delta.training.batch import Source
    from kohaku_delta.training.loop import Loop

    lanes.own(recipe.schedule.lanes, rank, ranks)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    text_files, texts = tokenizers(files)
    places = tars(files)
    if not places:
        raise Refusal(f"{files['tars']} holds no tar (data-0000.tar …). Name the folder of the tars with --tars.")
    folder = work / state.key(dependencies(recipe, files, text_files, list(places.values())))[:16]
    with state.locked(work, rank):
        if ranks > 1:
            dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(minutes=10))
        model = sdxl(recipe, files["base"], texts, device, getattr(torch, recipe.train.precision))
        if recipe.train.gradient_checkpointing:
            for name in ("unet", "te1", "te2"):
                getattr(model.models[name], "enable_gradient_checkpointing" if name == "unet" else "gradient_checkpointing_enable")()
                model.models[name].train()
        with stream.open_file(files["base"]) as base:
            digest = base.digest()
        adapter = Adapter(model.models, recipe.lokr, getattr(torch, recipe.train.weights)).to(device)
        source = Source(
            table.read(files["posts"], ["post_id", "tar", "offset", "size", "width", "height"]),
            table.read(files["captions"], ["post_id", "caption"]),
            next(iter(places.values())).parent,
            texts,
            recipe.train,
            recipe.caption.separator,
            latent_step(model),
        )
        loop = Loop(recipe, model, adapter, source, table.read(files["schedule"]), digest, folder, rank, ranks)
        done = 0
        with tqdm(total=loop.steps, desc="train", unit="step", disable=None if rank == 0 else True) as bar:
            for done, loss, _ in loop.run():
                bar.update(done - bar.n)
                bar.set_postfix(loss=f"{loss:.4f}")
        if ranks > 1:
            dist.destroy_process_group()
        if loop.stopping and done < loop.steps:
            raise Refusal(f"Stopped after step {done} of {loop.steps}, and saved. Run the stage again to go on from there.")
        if rank:
            return None
        rows = loop.journal.rows
        weights = {name: tensor.cpu().numpy() for name, tensor in adapter.tensors().items()}
        facts = {"ss_steps": str(len(rows)), "ss_num_train_images": str(len(source.post_ids))}
        written = lokr.write(files["out"], weights, recipe, digest, facts)
        table.write(loop.journal.table(), files["journal"])
        with atomic.writing(files["curves"], "w") as file:
            file.write(CURVES)
            for row in rows:
                mean = sum(row["losses"]) / len(row["losses"])
                file.write(f"{row['step']},{mean!r},{row['gradient_norm']!r},{row['learning_rate_unet']!r},{row['learning_rate_text']!r}\n")
        return f"{len(rows):,} steps, {len(adapter.entries):,} LoKr entries, sha256 {written.sha256[:16]}… → {files['out']}, {files['journal']}"
