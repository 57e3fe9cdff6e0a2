"""Invariant: one rank from declared files to the LoKr; rank 0 alone writes, and only when the last step is made.

Order: numerics held → models and adapter built from the base → state taken up → steps → LoKr, journal, curves. A step's time, throughput and
memory go to `log.csv` in the work folder, which nothing depends on.
"""

import os
import resource
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from tqdm import tqdm

from kohaku_delta import atomic, numerics, table
from kohaku_delta.danbooru import tars as tar_files
from kohaku_delta.hub import inputs as hub_inputs
from kohaku_delta.hub.digest import hashed
from kohaku_delta.params import Recipe
from kohaku_delta.refusal import Refusal
from kohaku_delta.sdxl.tokenizer import ClipTokenizer

CURVES = "step,loss,gradient_norm,learning_rate_unet,learning_rate_text\n"


LOG = "step,seconds,images_per_second,peak_mib,ranks\n"


def decisive(recipe: Recipe) -> dict:
    """The parameters that move bits: {section.key: value}, as YAML knows them."""
    sections = {"schedule": recipe.schedule.model_dump(), "lokr": recipe.lokr.model_dump(), "model": recipe.model.model_dump()}
    sections |= {"train": recipe.train.model_dump(), "caption": {"separator": recipe.caption.separator}}
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def dependencies(recipe: Recipe, files: dict[str, Path], texts: list[Path], tars: list[Path]) -> dict[str, str]:
    """Digests of all that decides the result: files, code, parameters that move bits, numerics, libraries. Of tars given by hand, names and sizes."""
    from kohaku_delta.training import state

    return {
        **{name: hashed(files[name]) for name in ("base", "posts", "captions", "schedule")},
        **state.code(recipe.requirements),
        **{name: str(value) for name, value in decisive(recipe).items()},
        "tokenizers": str([hashed(path) for path in texts]),
        "tars": str([(path.name, path.stat().st_size) for path in tars] if files["tars"] else hub_inputs.sha256s(files["inputs"], "tars")),
        "numerics": str(sorted(numerics.contract(recipe.train.device).items())),
    }


def tokenizers(files: dict[str, Path]) -> tuple[list[Path], tuple]:
    """Both tokenizers, and the four files that they were made of."""
    pairs = [hub_inputs.tokenizer(files["inputs"], name, files[name]) for name in ("tokenizer", "tokenizer_2")]
    return [path for pair in pairs for path in pair], tuple(ClipTokenizer(*pair) for pair in pairs)


def tars(files: dict[str, Path]) -> dict[int, Path]:
    """The tars by number: of the folder given by hand, or of the verified inputs."""
    return tar_files.folder(files["tars"]) if files["tars"] else tar_files.numbered(hub_inputs.paths(files["inputs"], "tars"))


def sdxl(recipe: Recipe, checkpoint: Path, tokenizers: tuple, device: str, precision, form=None):
    """The model of a checkpoint, ready for losses; `form`: how conditions reach the U-Net (None: as the recipe trains). Refuses tokenizers with more tokens than the text encoders have embeddings."""
    from kohaku_delta.checkpoint import modules
    from kohaku_delta.training.model import ConditioningForm, Sdxl

    models = modules.load(checkpoint, recipe.model, dtype=precision)
    for name, tokens in zip(("te1", "te2"), tokenizers):
        if len(tokens) > models[name].config.vocab_size:
            raise Refusal(f"{checkpoint}: text encoder {name[-1]} has {models[name].config.vocab_size} token embeddings and its tokenizer {len(tokens)} tokens. They are of different models.")
    models["vae"].float()
    models = {name: model.to(device) for name, model in models.items()}
    form = form or ConditioningForm.of(recipe.train)
    return Sdxl(models, tokenizers[1].eos_token_id, recipe.model.vae_scaling_factor, recipe.train.min_snr_gamma, device, precision, form)


def latent_step(model) -> int:
    """Pixels a latent: 8 for SDXL's VAE."""
    return 2 ** (len(model.models["vae"].config.block_out_channels) - 1)


def parts(recipe: Recipe, files: dict[str, Path], texts: tuple, places: dict[int, Path], device: str):
    """Model, adapter, source and schedule on a device, from declared files; the journal's header. Refuses a run without tars."""
    import torch

    from kohaku_delta.checkpoint import stream
    from kohaku_delta.training.adapter import Adapter
    from kohaku_delta.training.batch import Source
    from kohaku_delta.training.loop import Parts

    if not places:
        raise Refusal(f"{files['tars']} holds no tar (data-0000.tar …). Name the folder of the tars with --tars.")
    model = sdxl(recipe, files["base"], texts, device, getattr(torch, recipe.train.precision))
    if recipe.train.gradient_checkpointing:
        model.checkpointed()
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
    return Parts(model, adapter, source, table.read(files["schedule"]), {"base": digest, "parameters": decisive(recipe)})


def train(recipe: Recipe, files: dict[str, Path], work: Path) -> str | None:
    """Runs this process's rank to the end. Returns the summary line on rank 0, None on the others."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = recipe.train.device
    numerics.hold(device)
    import torch
    import torch.distributed as dist

    from kohaku_delta.training import lanes, state, together
    from kohaku_delta.training.loop import Loop

    lanes.own(recipe.schedule.lanes, rank, ranks)
    if device == "cuda":
        card = int(os.environ.get("LOCAL_RANK", 0))
        if card >= torch.cuda.device_count():
            raise Refusal(f"This machine has {torch.cuda.device_count()} GPUs, and rank {rank} wants a further one. Name fewer ranks (--ranks; torchrun's --nproc-per-node).")
        torch.cuda.set_device(card)
    text_files, texts = tokenizers(files)
    places = tars(files)
    with state.locked(work, rank):
        made = parts(recipe, files, texts, places, device)
        steps = int(made.schedule["step"][-1].as_py()) + 1
        depends = dependencies(recipe, files, text_files, list(places.values()))
        folder = state.claim(work, depends, steps, rank)
        if ranks > 1:
            try:
                dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(minutes=10))
            except RuntimeError as error:
                raise Refusal(f"Rank {rank} did not find the others ({str(error).splitlines()[0]}). Look at what they said, on every machine.") from None
            together.agree(depends, ranks, device)
        loop = Loop(recipe, made, folder, rank, ranks)
        done = 0
        images = np.add.reduceat(pc.list_value_length(made.schedule["visits"]).to_numpy(), loop.starts[:-1])
        with tqdm(total=loop.steps, desc="train", unit="step", disable=None if rank == 0 else True) as bar:
            for done, loss, seconds in loop.run():
                bar.update(done - bar.n)
                if rank == 0:
                    speed = images[done - 1] / seconds
                    bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{speed:.2f}")
                    log(folder / "log.csv", f"{done - 1},{seconds:.3f},{speed:.3f},{peak(device)},{ranks}\n")
        if ranks > 1:
            dist.destroy_process_group()
        if loop.stopping and done < loop.steps:
            if rank:
                raise SystemExit(1)
            raise Refusal(f"Stopped after step {done} of {loop.steps}, and saved. Run the stage again to go on from there.")
        if rank:
            return None
        tars(files)  # compared again: nothing is written of pictures that were changed during the weeks of a training
        rows = loop.journal.rows
        written = loop.write(files["out"])
        loop.journal.lokr = written.digest
        loop.journal.write(files["journal"])
        with atomic.writing(files["curves"], "w") as file:
            file.write(CURVES)
            for row in rows:
                mean = sum(row["losses"]) / len(row["losses"])
                file.write(f"{row['step']},{mean!r},{row['gradient_norm']!r},{row['learning_rate_unet']!r},{row['learning_rate_text']!r}\n")
        return f"{len(rows):,} steps, {len(made.adapter.entries):,} LoKr entries, sha256 {written.sha256[:16]}… → {files['out']}, {files['journal']}"


def log(path: Path, line: str) -> None:
    """Appends what varies from host to host; the first line names the columns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(line if file.tell() else LOG + line)


def peak(device: str) -> int:
    """Peak memory so far, MiB: of the card, or of this process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
