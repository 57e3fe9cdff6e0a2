"""Where a tensor is in a diffusers folder, its name there, and its form. No other module knows."""

import numpy as np

from kohaku_delta.sdxl.tensor_names import TensorMapping

PLACES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "te1": "text_encoder/model.safetensors",
    "te2": "text_encoder_2/model.safetensors",
}


def diffusers_name(entry: TensorMapping) -> str:
    """The tensor's name in its file: text encoders under `text_model.…`, which every transformers version reads."""
    return (
        "text_model." + entry.path if entry.part == "te1" and not entry.path.startswith("text_model.") else entry.path
    )


def to_diffusers(entry: TensorMapping, array: np.ndarray) -> np.ndarray:
    """The module's parameter, flat, from the checkpoint's whole array."""
    if entry.form == "stacked":
        array = np.split(array, 3)[entry.third]
    elif entry.form == "transposed":
        array = array.T
    return np.ascontiguousarray(array).reshape(-1)
