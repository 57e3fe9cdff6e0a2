"""A recipe's training in the forms that kohya's tools read: a TOML for sd-scripts' --config_file, a preset for LyCORIS.

For people who want to train on without this project. The keys are options of sd-scripts' sdxl_train_network.py (v0.8.3,
the release's, to v0.9.1) and of LyCORIS's PresetConfig (2.1 to 4.1). What neither tool has an option for is a comment.
"""

from pathlib import PurePosixPath
from typing import Any

import tomlkit
from tomlkit.items import KeyType, SingleKey

from kohaku_delta.params import NETWORK_WEIGHTS, Pin, Preset, Recipe
from kohaku_delta.weights.lokr_preset import CLASSES

MIXED_PRECISION = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}
SAVED_PRECISION = {"float32": "float", "float16": "fp16"}
INNER = ("CrossAttention", "FeedForward")  # lie inside a Transformer2DModel
TEXT_ENCODER = ("CLIPAttention", "CLIPMLP")
NOTES = """\
The training of {title}, as its recipe ran it, for sd-scripts. From the folder of the model card:
  accelerate launch --num_processes {ranks} sdxl_train_network.py --config_file {file} --train_data_dir (or --in_json) …
with captions of the form "kept tags, {separator}other tags". Written for {ranks} process(es): accumulation and
warm-up depend on that number. sd-scripts draws its own shuffle, noise and time steps, so it trains a similar LoKr, not
this one. Its version decides what has no option there: the crop that the model is told (here: {crop}), the divisor of
the time step's exponents (here: {exponents}; 159 before v0.8.5), the pooled output of text encoder 2 (here:
{projection}) and the divisor of the last, partial step (here: {divisor})."""


def training_toml(recipe: Recipe) -> str:
    """The settings of the training. Paths are seen from the folder that is published."""
    notes = NOTES.format(
        title=recipe.bake.title,
        ranks=recipe.execution.ranks,
        file=recipe.release.training,
        separator=recipe.caption.separator,
        crop=recipe.train.crop_conditioning,
        exponents=160 - recipe.train.timestep_freq_shift,
        projection=recipe.train.text_projection,
        divisor=recipe.train.last_step_divisor,
    )
    if isinstance(start := recipe.download.inputs.get(NETWORK_WEIGHTS), Pin):
        notes += f"\nIt began with the LoKr {start.url} (network_weights), which is not in this folder."
    document = tomlkit.document()
    for line in notes.splitlines():
        document.add(tomlkit.comment("".join(letter for letter in line if letter.isprintable())))
    for section, values in _training(recipe).items():
        table = tomlkit.table()
        for key, value in values.items():
            if value is not None:  # the option is left out
                table.add(key, value)
        document.add(section, table)
    return tomlkit.dumps(document)


def _training(recipe: Recipe) -> dict[str, dict[str, Any]]:
    train, schedule, lokr, ranks = recipe.train, recipe.schedule, recipe.lokr, recipe.execution.ranks
    start = recipe.download.inputs.get(NETWORK_WEIGHTS)
    half = train.precision == "float16" and train.weights == "float16"
    flags = [f"dora_wd={lokr.dora}"] if lokr.dora else []
    # LyCORIS 2.1 looks for whole names in name_algo_map, so that patterns get the default factor there
    by_name = set(lokr.preset.names.values())
    if len(by_name) == 1:
        flags.append(f"factor={by_name.pop()}")
    size = f"conv_dim={lokr.dim}", f"conv_alpha={lokr.alpha}"
    return {
        "model": {"pretrained_model_name_or_path": recipe.release.base},
        "network": {
            "network_module": "lycoris.kohya",
            "network_dim": lokr.dim,
            "network_alpha": float(lokr.alpha),
            "network_weights": PurePosixPath(start.url).name if isinstance(start, Pin) else None,
            "network_args": [
                f"preset={recipe.release.preset}", "algo=lokr", *size, f"train_norm={lokr.preset.norms}", *flags
            ],
        },
        "optimizer": {
            "optimizer_type": train.optimizer,
            "optimizer_args": [
                f"weight_decay={train.weight_decay}", "betas=" + ",".join(str(beta) for beta in train.betas)
            ],
            "learning_rate": train.learning_rate_unet,
            "unet_lr": train.learning_rate_unet,
            "text_encoder_lr": train.learning_rate_text,
            "lr_scheduler": "constant_with_warmup" if train.warmup_steps else "constant",
            "lr_warmup_steps": train.warmup_steps * ranks,  # every process advances the schedule once per update
            "max_grad_norm": train.clip_norm,
        },
        "batches": {
            "seed": train.seed,
            "max_train_epochs": schedule.epochs if schedule.max_steps is None else None,
            "max_train_steps": schedule.max_steps,
            "train_batch_size": schedule.batch_size,
            "gradient_accumulation_steps": max(1, schedule.micro_batches // ranks),
            "resolution": _resolution(schedule.area, schedule.side_step),
            "enable_bucket": True,
            "bucket_no_upscale": False,
            "bucket_reso_steps": schedule.side_step,
            "min_bucket_reso": schedule.min_side,
            "max_bucket_reso": schedule.max_side,
        },
        "captions": {
            "caption_extension": ".txt",  # HakuBooru's; sd-scripts' is .caption, and it trains without captions too
            "max_token_length": train.max_token_length if train.max_token_length > 75 else None,
            "keep_tokens_separator": recipe.caption.separator,
            "shuffle_caption": train.shuffle_caption,
            "caption_tag_dropout_rate": train.tag_dropout,
        },
        "loss": {"noise_offset": train.noise_offset or None, "min_snr_gamma": train.min_snr_gamma},
        "memory": {
            "mixed_precision": MIXED_PRECISION[train.precision],
            "full_fp16": True if half else None,
            "no_half_vae": True,  # encodes in float32, as this recipe does
            "gradient_checkpointing": train.gradient_checkpointing,
            "xformers": True if train.device == "cuda" else None,
        },
        "output": {
            "output_dir": "output",
            "output_name": recipe.release.lokr.rpartition("/")[2].removesuffix(".safetensors"),
            "save_model_as": "safetensors",
            "save_precision": SAVED_PRECISION[train.weights],
            "save_every_n_steps": train.milestone_every,
            "save_state": True,
        },
    }  # fmt: skip


def _resolution(area: int, step: int) -> str:
    """Width and height of exactly this area, as near to a square as multiples of `step` allow; else the square below
    it. sd-scripts takes the area of its buckets from their product.
    """
    side = int(area**0.5)
    exact = [width for width in range(step, side + 1, step) if area % width == 0]
    return f"{exact[-1]},{area // exact[-1]}" if exact else f"{side},{side}"


def preset_toml(preset: Preset) -> str:
    """The preset. A class inside another one is reached through the outer one, or LyCORIS would train it twice. Names
    are closed with `([.]|$)`, because LyCORIS takes them for patterns of any prefix. The keys are literal strings: toml
    0.10.2, with which LyCORIS reads, leaves the escapes in the others.
    """
    outer = [name for name in preset.modules if name not in TEXT_ENCODER]
    if "Transformer2DModel" in preset.modules:
        outer = [name for name in outer if name not in INNER]
    names = {f"(?:{name})([.]|$)": factor for name, factor in preset.names.items()}
    modules = {
        name: factor
        for key, factor in preset.modules.items()
        for name in (CLASSES[key] if key in TEXT_ENCODER else (key,))  # transformers' classes differ by version
    }
    content = {
        "enable_conv": True,
        "unet_target_module": outer,
        "unet_target_name": list(names),
        "text_encoder_target_module": [name for key in TEXT_ENCODER if key in preset.modules for name in CLASSES[key]],
        "text_encoder_target_name": [],
        "module_algo_map": {name: {"algo": "lokr", "factor": factor} for name, factor in modules.items()},
        "name_algo_map": {
            SingleKey(name, KeyType.Literal): {"algo": "lokr", "factor": factor} for name, factor in names.items()
        },
    }
    return tomlkit.dumps(content)
