"""A checkpoint as a diffusers folder: the same numbers, bit for bit, under the names that diffusers reads. The folder
can be loaded offline.

Text encoders get the names that every transformers version reads (`text_model.…`); tokenizers are copied; the
configurations follow from the recipe and the tensors' shapes. They include the VAE's scaling_factor, without which
pictures look washed out.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kohaku_delta import atomic_files
from kohaku_delta.errors import UserError
from kohaku_delta.formats import dtypes, safetensors_io
from kohaku_delta.formats.safetensors_header import TensorSpec
from kohaku_delta.formats.safetensors_io import SafetensorsFile
from kohaku_delta.params import Model
from kohaku_delta.sdxl import checkpoint_checks, model_loading
from kohaku_delta.sdxl.diffusers_layout import PLACES, diffusers_name, to_diffusers
from kohaku_delta.sdxl.tensor_names import PARTS, Layout, TensorNameMap
from kohaku_delta.sdxl.tokenizer import BEGIN, END

INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER = {  # SDXL 1.0's own
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
METADATA = {"format": "pt"}  # of each safetensors file
PADS = {"tokenizer": END, "tokenizer_2": "!"}  # SDXL's second tokenizer pads with token 0, which is also a "!" of texts


@dataclass
class ExportResult:
    bytes: int  # of the tensors
    left_out: list[str]  # tensors outside SDXL's four parts


Produce = Callable[[list[str]], Iterator[tuple[str, np.ndarray]]]


@dataclass
class ExportPlan:
    """The folder before it is computed: content of each small file, and tensors of each safetensors file, by path."""

    files: dict[str, bytes]
    weights: dict[str, tuple[dict[str, TensorSpec], Produce]]
    left_out: list[str]  # tensors outside SDXL's four parts


def export(
    checkpoint: Path, tokenizers: Mapping[str, tuple[Path, Path]], model: Model, out: Path, drop_extra: bool = False
) -> ExportResult:
    """Write the diffusers folder of a checkpoint. tokenizers: {"tokenizer": (vocab.json, merges.txt), "tokenizer_2":
    …}; drop_extra: leave out the tensors outside SDXL's four parts.

    Raises UserError for a checkpoint with missing, extra or other-shaped tensors, for another prediction than epsilon,
    for NaN and infinity, for dtypes that are not computed with, and for tokenizers with more tokens than the text
    encoders.
    """
    with (
        plan_export(checkpoint, tokenizers, model, drop_extra) as plan,
        atomic_files.atomic_dir(out, lambda name: name in plan.files or name in plan.weights) as aside,
    ):
        for name, content in plan.files.items():
            (aside / name).parent.mkdir(exist_ok=True)
            (aside / name).write_bytes(content)
        written = [
            safetensors_io.write(aside / name, specs, produce, METADATA).bytes
            for name, (specs, produce) in plan.weights.items()
        ]
    return ExportResult(sum(written), plan.left_out)


@contextmanager
def plan_export(
    checkpoint: Path, tokenizers: Mapping[str, tuple[Path, Path]], model: Model, drop_extra: bool = False
) -> Iterator[ExportPlan]:
    """What export() writes, with the checkpoint open and checked; raises as it does."""
    with safetensors_io.open_file(checkpoint) as file:
        checkpoint_checks.require_epsilon(file)
        checkpoint_checks.require_sdxl_weights(file)
        extra = checkpoint_checks.extra_tensors(file, drop_extra, "--drop-extra")
        shapes = {name: spec.shape for name, spec in file.specs.items() if name not in set(extra)}
        configs = model_loading.require_architecture(checkpoint, shapes, model)
        ends = {
            folder: _special_tokens(folder, files[0], configs[part]["vocab_size"])
            for part, (folder, files) in zip(("te1", "te2"), tokenizers.items(), strict=True)
        }
        names = TensorNameMap(Layout.of(shapes))
        plan = ExportPlan({}, {}, extra)
        plan.files["model_index.json"] = _json(INDEX)
        plan.files["scheduler/scheduler_config.json"] = _json(SCHEDULER)
        for folder, files in tokenizers.items():
            plan.files |= {f"{folder}/{name}": text for name, text in _tokenizer(files, PADS[folder]).items()}
        for part in PARTS:
            plan.files[f"{Path(PLACES[part]).parent}/config.json"] = _json(_config(part, configs[part], ends))
            plan.weights[PLACES[part]] = _tensors(file, part, names)
        yield plan


def _tensors(file: SafetensorsFile, part: str, names: TensorNameMap) -> tuple[dict[str, TensorSpec], Produce]:
    entries = {
        diffusers_name(entry): entry for entry in names.entries if entry.part == part and entry.key in file.specs
    }
    specs = {}
    for name, entry in entries.items():
        shape = entry.shape_in_module(file.specs[entry.key].shape)
        assert shape is not None  # require_architecture has compared all shapes
        specs[name] = TensorSpec(file.specs[entry.key].dtype, shape)

    def produce(order: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        for name in order:
            stored = file.read(entries[name].key)
            if not dtypes.all_finite(stored, specs[name].dtype):
                raise UserError(
                    f"{file.path}: {entries[name].key} holds NaN or infinity; no program can draw with such a model. "
                    "Run the stage that writes it again."
                )
            yield name, to_diffusers(entries[name], stored)

    return specs, produce


def _config(part: str, config: dict, ends: Mapping[str, dict]) -> dict:
    if part in ("unet", "vae"):
        return {"_class_name": INDEX[part][1], **config}
    folder = {"te1": "text_encoder", "te2": "text_encoder_2"}[part]
    return config | {
        "architectures": [INDEX[folder][1]],
        "model_type": "clip_text_model",
        # what a call without a dtype loads: diffusers takes float32 for U-Net and VAE, transformers takes this
        "dtype": "float32",
        **ends[folder.replace("text_encoder", "tokenizer")],
    }


def _special_tokens(folder: str, vocabulary: Path, words: int) -> dict[str, int]:
    try:
        known = json.loads(Path(vocabulary).read_text(encoding="utf-8"))
        if len(known) > words:
            raise UserError(
                f"{vocabulary} has {len(known)} tokens, and the text encoder has embeddings for {words}: they do not "
                "belong together."
            )
        return {"bos_token_id": known[BEGIN], "eos_token_id": known[END], "pad_token_id": known[PADS[folder]]}
    except FileNotFoundError:
        raise UserError(
            f"{vocabulary} does not exist. Run the download stage, or name the tokenizer's folder by its option."
        ) from None
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{vocabulary} is not a CLIP tokenizer's vocab.json: {BEGIN}, {END} and {PADS[folder]} must be in it."
        ) from None


def _tokenizer(files: tuple[Path, Path], pad: str) -> dict[str, bytes]:
    """The files of a tokenizer's folder."""
    content = {}
    for source, name in zip(files, ("vocab.json", "merges.txt"), strict=True):
        if not Path(source).is_file():
            raise UserError(
                f"{source} does not exist. Run the download stage, or name the tokenizer's folder by its option."
            )
        content[name] = Path(source).read_bytes()
    tokens = {"bos_token": BEGIN, "eos_token": END, "pad_token": pad, "unk_token": END}
    config = {"add_prefix_space": False, "do_lower_case": True, "model_max_length": 77}
    # a text that spells the padding token does not mean padding: "love live!" ends in "!", not in token 0
    config |= {"split_special_tokens": True} if pad != END else {}
    return content | {
        "special_tokens_map.json": _json(tokens),
        "tokenizer_config.json": _json(tokens | config | {"tokenizer_class": "CLIPTokenizer"}),
    }


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
