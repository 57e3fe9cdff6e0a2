"""The names of every tensor: in a checkpoint, in diffusers and transformers, and in a LoKr file. No other module spells
them; docs/tensor-names.md shows the table.

A checkpoint (one .safetensors file) has Stability's names: U-Net `model.diffusion_model.…` (SGM), TE1
`conditioner.embedders.0.transformer.text_model.…` (CLIP ViT-L as in transformers 4), TE2
`conditioner.embedders.1.model.…` (open_clip: q, k and v stacked, the projection transposed), VAE `first_stage_model.…`.
The table follows from the numbers of levels and layers alone, so it holds for SDXL and for any smaller model of its
architecture. Only shortcuts (where the number of channels changes) may be absent.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from kohaku_delta.errors import UserError

PARTS = ("unet", "te1", "te2", "vae")
PREFIX = {
    "unet": "model.diffusion_model.",
    "te1": "conditioner.embedders.0.transformer.text_model.",
    "te2": "conditioner.embedders.1.model.",
    "vae": "first_stage_model.",
}
POSITION_EMBEDDING = PREFIX["te1"] + "embeddings.position_embedding.weight"
POSITION_IDS = PREFIX["te1"] + "embeddings.position_ids"  # int64 0…76, a constant that old transformers stored
LOGIT_SCALE = PREFIX["te2"] + "logit_scale"  # a number that only CLIP's own training used
NO_PARAMETER = (POSITION_IDS, LOGIT_SCALE)
# transformers 5: CLIPTextModel lost its inner text_model, CLIPTextModelWithProjection kept it
TEXT_PATH = {"te1": "", "te2": "text_model."}

# (checkpoint, diffusers); every other name is the same in both
UNET_ENDS = (
    ("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"), ("out.0", "conv_norm_out"), ("out.2", "conv_out"),
)  # fmt: skip
UNET_RESNET = (
    ("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"), ("out_layers.3", "conv2"), ("skip_connection", "conv_shortcut"),
)  # fmt: skip
TRANSFORMER = ("norm", "proj_in", "proj_out")
TRANSFORMER_BLOCK = ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2") + tuple(
    f"attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")
)
WITHOUT_BIAS = (".to_q", ".to_k", ".to_v")  # of the U-Net
SHORTCUTS = (".skip_connection", ".nin_shortcut")
VAE_RESNET = tuple((x, x) for x in ("norm1", "conv1", "norm2", "conv2")) + (("nin_shortcut", "conv_shortcut"),)
VAE_ATTENTION = (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
OPEN_CLIP_LAYER = (
    ("attn.out_proj", "self_attn.out_proj"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
    ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
)  # fmt: skip
CLIP_LAYER = (*(f"self_attn.{x}_proj" for x in "qkv"), *(theirs for _, theirs in OPEN_CLIP_LAYER))
MAX_COUNT = 1000  # of levels, layers or blocks; SDXL has 32 layers in its second text encoder
STACKED = ("q_proj", "k_proj", "v_proj")  # the order of open_clip's in_proj rows


@dataclass(frozen=True)
class TensorMapping:
    """One parameter of a diffusers or transformers module, and its tensor in a checkpoint."""

    part: str
    path: str  # the parameter's name in its module: down_blocks.0.resnets.0.conv1.weight
    key: str  # the tensor in the checkpoint
    # same | stacked (rows of `third`) | transposed | conv1x1 (the checkpoint has [o, i, 1, 1], the module [o, i])
    form: str = "same"
    third: int = 0

    @property
    def optional(self) -> bool:
        return self.key.rpartition(".")[0].endswith(SHORTCUTS)

    @property
    def lora(self) -> str | None:
        """The module's name in a LoKr file (U-Net: the checkpoint's path; text encoders: transformers 4's path); None
        in the VAE.
        """
        if self.part == "unet":
            return "lora_unet_" + _flat(self.key.removeprefix(PREFIX["unet"]))
        if self.part == "te1":
            return "lora_te1_text_model_" + _flat(self.path)
        return "lora_te2_" + _flat(self.path) if self.part == "te2" else None

    def shape_in_module(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The parameter's shape if the checkpoint's tensor has `shape`; None if no parameter has such a tensor."""
        if self.form == "stacked":
            return (shape[0] // 3, *shape[1:]) if shape and shape[0] % 3 == 0 else None
        if self.form == "transposed":
            return shape[::-1] if len(shape) == 2 else None
        if self.form == "conv1x1":
            return shape[:2] if shape[2:] in ((), (1, 1), (1,)) else None
        return shape


def _flat(path: str) -> str:
    return path.removesuffix(".weight").removesuffix(".bias").replace(".", "_")


@dataclass(frozen=True)
class Layout:
    """The counts that decide the names."""

    levels: int  # of the U-Net
    layers: int  # resnets per level on the way down
    depths: tuple[int, ...]  # transformer blocks of each level on the way down; 0: no attention
    middle: int  # transformer blocks of the middle block
    te1_layers: int
    te2_layers: int
    vae_levels: int
    vae_layers: int

    @classmethod
    def of(cls, keys: Iterable[str]) -> "Layout":
        """The layout of a checkpoint with these tensor names. Raises UserError for names that are not SDXL's."""
        keys = list(keys)

        def count(pattern: str) -> int:
            compiled = re.compile(pattern)
            found = 1 + max((int(match[1]) for key in keys if (match := compiled.match(key))), default=-1)
            if found > MAX_COUNT:
                raise UserError(
                    f"this is not an SDXL checkpoint: a tensor's name has the number {found - 1}; at most {MAX_COUNT} "
                    "is read"
                )
            return found

        unet, vae = re.escape(PREFIX["unet"]), re.escape(PREFIX["vae"])
        blocks = count(rf"{unet}input_blocks\.(\d{{1,9}})\.")
        ops = re.compile(rf"{unet}input_blocks\.\d+\.0\.op\.weight$")
        levels = 1 + sum(bool(ops.match(key)) for key in keys)
        if not blocks or blocks % levels:
            raise UserError(
                f"this is not an SDXL checkpoint: it has {blocks} U-Net input blocks on {levels} levels under "
                f"{PREFIX['unet']}input_blocks. A single file with Stability's names is needed (not a diffusers "
                "folder's file, not a LoRA)."
            )
        layers = (blocks - levels) // levels
        depth = [
            count(rf"{unet}input_blocks\.{1 + level * (layers + 1)}\.1\.transformer_blocks\.(\d{{1,9}})\.")
            for level in range(levels)
        ]
        return cls(
            levels=levels,
            layers=layers,
            depths=tuple(depth),
            middle=count(rf"{unet}middle_block\.1\.transformer_blocks\.(\d{{1,9}})\."),
            te1_layers=count(rf"{re.escape(PREFIX['te1'])}encoder\.layers\.(\d{{1,9}})\."),
            te2_layers=count(rf"{re.escape(PREFIX['te2'])}transformer\.resblocks\.(\d{{1,9}})\."),
            vae_levels=count(rf"{vae}encoder\.down\.(\d{{1,9}})\."),
            vae_layers=count(rf"{vae}encoder\.down\.0\.block\.(\d{{1,9}})\."),
        )

    @classmethod
    def of_modules(cls, modules: Mapping) -> "Layout":
        """The layout of diffusers' and transformers' modules by part; the counts of absent parts are 0."""
        config = {part: module.config for part, module in modules.items()}
        unet, vae = config.get("unet"), config.get("vae")
        depths = zip(unet.transformer_layers_per_block, unet.down_block_types, strict=True) if unet else ()
        return cls(
            levels=len(unet.block_out_channels) if unet else 1,
            layers=unet.layers_per_block if unet else 0,
            depths=tuple(depth if "CrossAttn" in kind else 0 for depth, kind in depths) or (0,),
            middle=unet.transformer_layers_per_block[-1] if unet else 0,
            te1_layers=config["te1"].num_hidden_layers if "te1" in config else 0,
            te2_layers=config["te2"].num_hidden_layers if "te2" in config else 0,
            vae_levels=len(vae.block_out_channels) if vae else 0,
            vae_layers=vae.layers_per_block if vae else 0,
        )


SDXL = Layout(
    levels=3, layers=2, depths=(0, 2, 10), middle=10, te1_layers=12, te2_layers=32, vae_levels=4, vae_layers=2
)


def _unet(layout: Layout) -> Iterator[tuple[str, str]]:
    def resnet(ours: str, theirs: str):
        yield from ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in UNET_RESNET)

    def transformer(ours: str, theirs: str, depth: int):
        if depth:
            yield from ((f"{ours}.{name}", f"{theirs}.{name}") for name in TRANSFORMER)
        for block in range(depth):
            yield from (
                (f"{ours}.transformer_blocks.{block}.{name}", f"{theirs}.transformer_blocks.{block}.{name}")
                for name in TRANSFORMER_BLOCK
            )

    yield from UNET_ENDS
    for level, depth in enumerate(layout.depths):
        first = 1 + level * (layout.layers + 1)
        for layer in range(layout.layers):
            yield from resnet(f"input_blocks.{first + layer}.0", f"down_blocks.{level}.resnets.{layer}")
            yield from transformer(f"input_blocks.{first + layer}.1", f"down_blocks.{level}.attentions.{layer}", depth)
        if level < layout.levels - 1:
            yield f"input_blocks.{first + layout.layers}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
    yield from resnet("middle_block.0", "mid_block.resnets.0")
    yield from transformer("middle_block.1", "mid_block.attentions.0", layout.middle)
    yield from resnet("middle_block.2", "mid_block.resnets.1")
    for up, depth in enumerate(reversed(layout.depths)):
        for layer in range(layout.layers + 1):
            block = up * (layout.layers + 1) + layer
            yield from resnet(f"output_blocks.{block}.0", f"up_blocks.{up}.resnets.{layer}")
            yield from transformer(f"output_blocks.{block}.1", f"up_blocks.{up}.attentions.{layer}", depth)
        if up < layout.levels - 1:
            yield f"output_blocks.{block}.{2 if depth else 1}.conv", f"up_blocks.{up}.upsamplers.0.conv"


def _vae(layout: Layout) -> Iterator[tuple[str, str]]:
    yield from (("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv"))
    for side in ("encoder", "decoder"):
        yield from (
            (f"{side}.{a}", f"{side}.{b}")
            for a, b in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out"))
        )
        for i in (1, 2):
            yield from ((f"{side}.mid.block_{i}.{a}", f"{side}.mid_block.resnets.{i - 1}.{b}") for a, b in VAE_RESNET)
        yield from ((f"{side}.mid.attn_1.{a}", f"{side}.mid_block.attentions.0.{b}") for a, b in VAE_ATTENTION)
    for level in range(layout.vae_levels):
        # the checkpoint counts the decoder's levels from the bottom, diffusers from the top
        mirrored = layout.vae_levels - 1 - level
        for ours, theirs, more in (
            (f"encoder.down.{level}", f"encoder.down_blocks.{level}", 0),
            (f"decoder.up.{mirrored}", f"decoder.up_blocks.{level}", 1),
        ):
            for layer in range(layout.vae_layers + more):
                yield from ((f"{ours}.block.{layer}.{a}", f"{theirs}.resnets.{layer}.{b}") for a, b in VAE_RESNET)
        if level < layout.vae_levels - 1:
            yield f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv"
            yield f"decoder.up.{mirrored}.upsample.conv", f"decoder.up_blocks.{level}.upsamplers.0.conv"


def tensor_mappings(layout: Layout) -> Iterator[TensorMapping]:
    """Every parameter that a model of this layout can have."""
    for ours, theirs in _unet(layout):
        for kind in (".weight",) if ours.endswith(WITHOUT_BIAS) else (".weight", ".bias"):
            yield TensorMapping("unet", theirs + kind, PREFIX["unet"] + ours + kind)

    def te1(path: str) -> TensorMapping:
        return TensorMapping("te1", TEXT_PATH["te1"] + path, PREFIX["te1"] + path)

    def te2(path: str, key: str, **form) -> TensorMapping:
        return TensorMapping("te2", TEXT_PATH["te2"] + path, PREFIX["te2"] + key, **form)

    yield te1("embeddings.token_embedding.weight")
    yield te1("embeddings.position_embedding.weight")
    yield te2("embeddings.token_embedding.weight", "token_embedding.weight")
    yield te2("embeddings.position_embedding.weight", "positional_embedding")
    yield TensorMapping("te2", "text_projection.weight", PREFIX["te2"] + "text_projection", form="transposed")
    for kind in (".weight", ".bias"):
        yield te1("final_layer_norm" + kind)
        yield te2("final_layer_norm" + kind, "ln_final" + kind)
        for layer in range(layout.te1_layers):
            yield from (te1(f"encoder.layers.{layer}.{name}{kind}") for name in CLIP_LAYER)
        for layer in range(layout.te2_layers):
            here, there = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
            yield from (te2(here + theirs + kind, there + ours + kind) for ours, theirs in OPEN_CLIP_LAYER)
            for third, name in enumerate(STACKED):
                yield te2(
                    f"{here}self_attn.{name}{kind}", f"{there}attn.in_proj_{kind[1:]}", form="stacked", third=third
                )
    for ours, theirs in _vae(layout):
        for kind in (".weight", ".bias"):
            linear = kind == ".weight" and ".mid.attn_1." in ours and not ours.endswith(".norm")
            yield TensorMapping("vae", theirs + kind, PREFIX["vae"] + ours + kind, form="conv1x1" if linear else "same")


class TensorNameMap:
    """The table of one layout, with an index for each kind of name."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.entries = list(tensor_mappings(layout))
        self.by_path = {(entry.part, entry.path): entry for entry in self.entries}
        self.by_key: dict[str, list[TensorMapping]] = {}
        for entry in self.entries:
            self.by_key.setdefault(entry.key, []).append(entry)

    def by_lora(self) -> dict[str, tuple[TensorMapping, TensorMapping | None]]:
        """A LoKr file's module name → (weight, bias). Includes the names that other trainers write (diffusers' paths,
        transformers 5's, SimpleTuner's).
        """
        modules: dict[str, tuple[TensorMapping, TensorMapping | None]] = {}
        for entry in self.entries:
            if entry.path.endswith(".weight") and entry.lora:
                pair = (entry, self.by_path.get((entry.part, entry.path.removesuffix("weight") + "bias")))
                modules[entry.lora] = pair
                modules.setdefault(f"lora_{entry.part}_" + _flat(entry.path), pair)
                modules.setdefault(f"lora_{entry.part}_" + _flat(entry.path.removeprefix("text_model.")), pair)
                if entry.part == "unet":
                    modules.setdefault("lycoris_" + _flat(entry.path), pair)
        return modules

    def unknown(self, keys: Iterable[str]) -> list[str]:
        """The keys that are not in the table, sorted."""
        return sorted(key for key in keys if key not in self.by_key and key not in NO_PARAMETER)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The tensors of a whole checkpoint that are not among `keys`, sorted."""
        keys = set(keys)
        return sorted(key for key, entries in self.by_key.items() if key not in keys and not entries[0].optional)
