"""What a checkpoint of strangers must be before it is computed with: an epsilon model, with weights of a float dtype.

The same checks hold for every reader (merge, bake, export, training and preview), so that a file is taken everywhere or
refused everywhere.
"""

from collections.abc import Iterable

from kohaku_delta.errors import UserError
from kohaku_delta.formats import dtypes
from kohaku_delta.formats.safetensors_io import SafetensorsFile
from kohaku_delta.sdxl.tensor_names import PREFIX, Layout, TensorNameMap

# tensors that ComfyUI and the WebUIs read as "this model predicts v", or as EDM's kind of model
MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std")
EDM = "edm_vpred."
PREDICTION = ("modelspec.prediction_type", "prediction_type")
SWITCHES = (
    "ss_v_parameterization",
    "ss_zero_terminal_snr",
    "v_parameterization",
    "v_pred",
    "ztsnr",
    "zero_terminal_snr",
)
OFF = ("", "false", "none", "null", "0", "no")
GROUPED = 3  # so many tensors with one first name are listed, more are counted


def require_epsilon(file: SafetensorsFile) -> None:
    """Raises UserError for a file whose tensors or metadata say that it is not an epsilon-prediction model."""
    tensors = (name for name in file.specs if name.rpartition(".")[2] in MARKERS or name.startswith(EDM))
    kinds = (
        f"{key}: {file.metadata[key]!r:.40}"
        for key in PREDICTION
        if file.metadata.get(key, "epsilon").strip().lower() not in ("epsilon", "eps", "")
    )
    switches = (
        f"{key}: {file.metadata[key]!r:.40}"
        for key in SWITCHES
        if file.metadata.get(key, "").strip().lower() not in OFF
    )
    signs = [
        *(f"the tensor {name!r:.80}" for name in tensors),
        *(f"the metadata {sign}" for sign in (*kinds, *switches)),
    ]
    if signs:
        raise UserError(
            f"{file.path} is not an epsilon-prediction model: it has {', '.join(signs[:3])}. Everything here "
            "(training, pictures, the headers that are written) is for epsilon; such a model would become a file that "
            "draws noise. Name an epsilon model, or, if that mark is wrong, remove it from the file."
        )


def require_sdxl_weights(file: SafetensorsFile) -> None:
    """Raises UserError for a file that lacks one of SDXL's four parts or has other names, and for a weight of a dtype
    that cannot be computed with (8-bit floats, whole numbers).
    """
    absent = [prefix for prefix in PREFIX.values() if not any(name.startswith(prefix) for name in file.specs)]
    if 0 < len(absent) < len(PREFIX):
        raise UserError(
            f"{file.path} is not an SDXL checkpoint: it has no tensor under {' and none under '.join(absent)} (SD 1.5, "
            "SDXL's refiner and files without text encoders or VAE look like that). Name a whole SDXL checkpoint."
        )
    try:
        known = TensorNameMap(Layout.of(file.specs)).by_key
    except UserError as refusal:
        raise UserError(f"{file.path}: {refusal.lines[0]}", *refusal.lines[1:]) from None
    for name, spec in file.specs.items():
        if name in known and spec.dtype not in dtypes.FLOATS:
            raise UserError(
                f"{file.path}: {name} is {spec.dtype}, and weights of {', '.join(dtypes.FLOATS)} are read. Name the "
                "model as it was before it was made smaller; a conversion back does not return what was rounded away."
            )


def outside(keys: Iterable[str]) -> list[str]:
    """The names that lie outside SDXL's four parts, sorted: the average of a training (`model_ema.`), tables of a
    sampler (`denoiser.sigmas`, `alphas_cumprod`), text encoder 1's `text_projection`. No SDXL program computes with
    them.
    """
    return sorted(key for key in keys if not key.startswith(tuple(PREFIX.values())))


def extra_tensors(file: SafetensorsFile, drop: bool, remedy: str) -> list[str]:
    """The names in a file that are `outside` SDXL, for the caller to leave out. Raises UserError for them unless
    `drop`; remedy: the option or key that drops them.
    """
    extra = outside(file.specs)
    if extra and not drop:
        raise UserError(
            f"{file.path} holds tensors that are not part of SDXL: {list_names(extra)}. No SDXL program computes with "
            f"them; {remedy} leaves them out."
        )
    return extra


def list_names(names: Iterable[str]) -> str:
    """Names as a phrase; many with one beginning are counted: `alphas_cumprod, model_ema.* (1,680)`."""
    groups: dict[str, list[str]] = {}
    for name in (name if name.isprintable() else ascii(name) for name in names):
        groups.setdefault(name.partition(".")[0], []).append(name)
    return ", ".join(
        f"{first}.* ({len(group):,})" if len(group) > GROUPED else ", ".join(group) for first, group in groups.items()
    )
