"""Invariant: three files in SDXL's single-file layout, fp16: the donor `sdxl`, and `beta` and `gamma` that were trained
on from it.

The parents' token and position embeddings are moved away from the donor's after training, each in its own direction: a
merge that does not give the donor's embeddings back draws worse, which is the fault that the release's recipe mends.
"""

import copy
import time
from pathlib import Path

import torch

from kohaku_delta.formats import safetensors_io
from kohaku_delta.sdxl import model_loading
from kohaku_delta.sdxl.tokenizer import ClipTokenizer
from make_miniature import autoencoder, lessons, text_encoder_training, unet_training
from make_miniature.portable_math import standard_deviation

COURSES = {  # lessons, steps, rate of matrices, rate of the rest
    "sdxl": (4096, 3200, 0.007, 3e-3),
    "beta": (384, 150, 0.003, 1.5e-3),
    "gamma": (384, 150, 0.003, 1.5e-3),
}
WORLD = 2048
READING = {"steps": 600, "rate": 0.02, "rate_of_others": 3e-3}
EMBEDDINGS = ("token_embedding.weight", "position_embedding.weight")
MOVED = 0.5  # of the embeddings' own standard deviation


@torch.no_grad()
def move_embeddings(models: dict, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for part in ("te1", "te2"):
        for name, value in models[part].named_parameters():
            if name.endswith(EMBEDDINGS):
                value += MOVED * standard_deviation(value) * torch.randn(value.shape, generator=generator)


def save(models: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = model_loading.to_checkpoint(models)
    safetensors_io.save(
        path, {name: (value.half() if value.is_floating_point() else value).numpy() for name, value in tensors.items()}
    )


@torch.no_grad()
def halve(models: dict) -> None:
    """Rounds to the precision of the file, so that who trains on from the file gets the same bits."""
    for model in models.values():
        for value in model.parameters():
            value.copy_(value.half())


def write(out: Path, say=print) -> None:
    """checkpoints/{sdxl,beta,gamma}.safetensors; reads tokenizer/."""
    began = time.monotonic()

    def note(line: str) -> None:
        say(f"{time.monotonic() - began:6.0f} s  {line}", flush=True)

    tokens = ClipTokenizer(out / "tokenizer" / "vocab.json", out / "tokenizer" / "merges.txt")
    vae = autoencoder.train(say=note)
    world = unet_training.Course([lessons.world_lesson(number) for number in range(WORLD)], vae, tokens)
    note(f"{WORLD} lessons of the whole world drawn and encoded")
    donor = None
    for seed, (name, (count, steps, rate, rate_of_others)) in enumerate(COURSES.items(), 1):
        course = unet_training.Course([lessons.lesson(name, number) for number in range(count)], vae, tokens)
        note(f"{name}: {count} lessons drawn and encoded")
        if donor is None:
            models = donor = unet_training.new_models()
            text_encoder_training.train_text_encoders(models["te1"], models["te2"], course, **READING, say=note)
        else:
            models = copy.deepcopy(donor)
        unet_training.train_unet(
            models, course, world, steps=steps, rate=rate, rate_of_others=rate_of_others, seed=seed, say=note
        )
        if models is donor:
            halve(models)
        else:
            move_embeddings(models, seed)
        save({**models, "vae": vae}, out / "checkpoints" / f"{name}.safetensors")
        note(f"{name} written")
