"""lycoris.utils.merge, unchanged, on a whole model in memory: reads a checkpoint and a LoKr file, writes a checkpoint.

Run by benchmarks/checkpoint.py: `python benchmarks/run_lycoris.py BASE LOKR OUT --dtype float32`. The last line shows
how long each part took.
"""

import json
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1] / "src")

import click
import torch
from lycoris.utils import merge
from safetensors.torch import load_file, save_file

from kohaku_delta import params
from kohaku_delta.sdxl import model_loading
from kohaku_delta.sdxl.tensor_names import PREFIX, Layout, TensorNameMap

RECIPE = Path(__file__).resolve().parents[1] / "params.yaml"


def under_lokr_names(models: dict[str, torch.nn.Module]) -> tuple[list[torch.nn.Module], torch.nn.Module]:
    """The text encoders and the U-Net with the LoKr file's names as paths, by which LyCORIS finds a layer."""
    unet, te1 = torch.nn.Module(), torch.nn.Module()
    for entry in TensorNameMap(Layout.of_modules(models)).entries:
        if entry.part == "unet" and entry.path.endswith(".weight"):
            try:
                layer = models["unet"].get_submodule(entry.path.removesuffix(".weight"))
            except AttributeError:  # a shortcut that this resnet does not have
                continue
            *path, last = entry.key.removeprefix(PREFIX["unet"]).removesuffix(".weight").split(".")
            place = unet
            for part in path:
                place = (
                    place.get_submodule(part)
                    if hasattr(place, part)
                    else place.register_module(part, torch.nn.Module()) or place.get_submodule(part)
                )
            place.register_module(last, layer)
    te1.register_module("text_model", models["te1"])
    return [te1, models["te2"]], unet


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("lokr", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Of the model while it is merged.",
)
def main(base: Path, lokr: Path, out: Path, dtype: str) -> None:
    """Merge a LoKr file into a checkpoint with LyCORIS."""
    begun = time.perf_counter()
    models = model_loading.load(base, params.load(RECIPE).model, dtype=getattr(torch, dtype))
    loaded = time.perf_counter()
    merge(*under_lokr_names(models), load_file(lokr), 1.0)
    merged = time.perf_counter()
    tensors = {
        name: value.half() if value.is_floating_point() else value
        for name, value in model_loading.to_checkpoint(models).items()
    }
    save_file(tensors, out, {"format": "pt"})
    saved = time.perf_counter()
    click.echo(
        json.dumps(
            {"load": round(loaded - begun, 1), "merge": round(merged - loaded, 1), "save": round(saved - merged, 1)}
        )
    )


if __name__ == "__main__":
    main()
