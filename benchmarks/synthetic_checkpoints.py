"""Checkpoints with SDXL's tensor names and, at scale 1, its shapes (6.9 GB of fp16). Scale and seed decide every byte.

Run `python benchmarks/synthetic_checkpoints.py work/bench/files`. One block of numbers is drawn and repeated over all
tensors, so a file is written at the disk's speed. Weights of norms are 1, so that a training finds finite losses. Below
scale 1 the widths shrink, in steps of one attention head; names, depths and the preset's targets stay.
"""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT / "src"))
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # LyCORIS loads it; it warns about kernels not used here

import click
import numpy as np
import torch
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule

from kohaku_delta import params
from kohaku_delta.formats import safetensors_io
from kohaku_delta.formats.safetensors_header import TensorSpec
from kohaku_delta.formats.safetensors_io import WriteResult
from kohaku_delta.sdxl import model_loading
from kohaku_delta.sdxl.tensor_names import NO_PARAMETER, POSITION_IDS
from kohaku_delta.weights import lokr_format, lokr_preset

BLOCK = (1 << 22) + 4099  # numbers drawn; no tensor's width divides it
HEAD = 64
WORDS = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": None}
WORDS |= {"max_position_embeddings": 77, "vocab_size": 49408}
TRANSFORMERS = (
    ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)


def heads(scale: float, count: int) -> int:
    return max(1, round(count * scale))


def configs(scale: float) -> dict[str, dict]:
    """The four parts of SDXL 1.0, or of one with narrower U-Net and text encoders."""
    levels, te1, te2 = [heads(scale, count) for count in (5, 10, 20)], heads(scale, 12), heads(scale, 20)
    clip = {
        part: WORDS
        | {
            "hidden_size": HEAD * count,
            "intermediate_size": 4 * HEAD * count,
            "num_attention_heads": count,
            "projection_dim": HEAD * count,
            "num_hidden_layers": layers,
        }
        for part, count, layers in (("te1", te1, 12), ("te2", te2, 32))
    }
    return clip | {
        "unet": {
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": TRANSFORMERS[0],
            "up_block_types": TRANSFORMERS[1],
            "block_out_channels": tuple(HEAD * count for count in levels),
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": tuple(levels),
            "cross_attention_dim": HEAD * (te1 + te2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": HEAD * te2 + 6 * 256,
        },
        "vae": {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "latent_channels": 4,
        },
    }


def drawn(seed: int, spread: float = 0.02) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(BLOCK, np.float32) * np.float32(spread)).astype(np.float16)


def tile_block(block: np.ndarray, start: int, count: int) -> Iterator[np.ndarray]:
    """`count` numbers of the block from its index `start` on, starting again at its end."""
    place = start % len(block)
    while count:
        piece = block[place : place + count]
        yield piece
        count, place = count - len(piece), 0


def checkpoint(path: Path, seed: int, scale: float = 1.0, spread: float = 0.02) -> WriteResult:
    """A checkpoint in the layout of sd_xl_base_1.0.safetensors. spread: standard deviation of what is neither an
    embedding (0.02) nor a norm's weight (1).
    """
    tensors = model_loading.to_checkpoint(model_loading.build(configs(scale)))
    specs = {
        name: TensorSpec("I64" if name == POSITION_IDS else "F16", tuple(value.shape))
        for name, value in tensors.items()
    }
    constants = {name: tensors[name].numpy().astype("<i8" if name == POSITION_IDS else "<f2") for name in NO_PARAMETER}
    norms = [name for name, value in tensors.items() if value.ndim == 1 and name.endswith(".weight")]
    constants |= {name: np.ones(specs[name].count, "<f2") for name in norms}
    block, embeddings = drawn(seed, spread), drawn(seed)

    def produce(order: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        place = 0
        for name in order:
            if name in constants:
                yield name, constants[name].reshape(-1)
                continue
            numbers = embeddings if "embedding" in name else block
            yield from ((name, piece) for piece in tile_block(numbers, place, specs[name].count))
            place += specs[name].count

    return safetensors_io.write(path, specs, produce, {"format": "pt"})


def trained(path: Path, base: WriteResult, seed: int, scale: float = 1.0) -> int:
    """Write a LoKr file with the release's preset for a checkpoint of `scale`; return its number of parameters."""
    recipe = params.load(ROOT / "params.yaml")
    models, shapes = model_loading.build(configs(scale), ("te1", "te2", "unet")), {}
    with torch.device("meta"):
        for target in lokr_preset.lokr_targets(models, recipe.lokr.preset):
            layer = models[target.part].get_submodule(target.path)
            full = {
                "lora_dim": recipe.lokr.dim,
                "alpha": recipe.lokr.alpha,
                "factor": target.factor,
                "full_matrix": True,
            }
            entry = (
                NormModule(target.lora, layer) if target.algorithm == "norm" else LokrModule(target.lora, layer, **full)
            )
            shapes |= {f"{target.lora}.{suffix}": tuple(weight.shape) for suffix, weight in entry.named_parameters()}
    block, weights, place = drawn(seed), {}, 0
    for name, shape in sorted(shapes.items()):
        count = int(np.prod(shape))
        weights[name] = np.concatenate(list(tile_block(block, place, count))).reshape(shape)
        place += count
    lokr_format.write_lokr(path, weights, recipe, base.digest)
    return place


def write(folder: Path, seed: int, scale: float) -> int:
    """Write sdxl, gamma, beta (the donor and the parents) and lokr, "trained" on gamma; return the LoKr's number of
    parameters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        name: checkpoint(folder / f"{name}.safetensors", seed + place, scale)
        for place, name in enumerate(("sdxl", "gamma", "beta"))
    }
    return trained(folder / "lokr.safetensors", written["gamma"], seed + 3, scale)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--scale", default=1.0, show_default=True, help="Of the widths; the size goes with its square.")
@click.option("--seed", default=1, show_default=True)
def main(folder: Path, scale: float, seed: int) -> None:
    """Three checkpoints and a LoKr file in the layout and size of the release's."""
    parameters = write(folder, seed, scale)
    (folder / "parameters").write_text(f"{parameters}\n")
    click.echo(f"{parameters:,} LoKr parameters → {folder}")


if __name__ == "__main__":
    main()
