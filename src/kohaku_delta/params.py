"""The recipe: params.yaml as a model with an attribute per key. No unknown key, no wrong type, no default: the file
shows every value. docs/recipe.md explains each key.
"""

import math
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from kohaku_delta import strict_model, yaml_file
from kohaku_delta.strict_model import StrictModel

Positive = Annotated[int, Field(gt=0, lt=1 << 63)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Pixels = Annotated[int, Field(gt=0, le=8192, multiple_of=8)]  # SDXL's VAE makes one latent of 8 × 8 pixels
# half of a Philox key, whose other half may be from 2^63 on: numpy converts both to float64 then
Seed = Annotated[int, Field(ge=0, lt=1 << 53)]
Byte = Annotated[int, Field(ge=0, le=255)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt16 = Annotated[int, Field(gt=0, lt=1 << 15)]  # what schedule.parquet counts in int16
Dtype = Literal["float32", "float16", "bfloat16"]
Text = Annotated[str, Field(min_length=1)]
# optional in download.inputs, by kohya's name: the LoKr that the training begins with
NETWORK_WEIGHTS = "network_weights"


def _with_integer_keys(mapping: Any) -> Any:
    """The mapping with its keys as whole numbers. In the file they are strings, because `dvc params diff` fails for a
    file with numbers as keys.
    """
    if not isinstance(mapping, dict):
        return mapping
    for key in mapping:
        if not isinstance(key, str):
            raise ValueError(
                f'the key {key} needs quotes ("{key}"): DVC cannot compare a params.yaml with numbers as keys'
            )
        if not key.isascii() or not key.isdecimal():
            raise ValueError(f'the key "{key}" must be a whole number, in quotes')
    return {int(key): value for key, value in mapping.items()}


class Pin(StrictModel):
    """One input: `hf://[datasets/]owner/name[@revision]/file` or `file://path`. sha256: whole, a prefix, or null."""

    url: Annotated[str, Field(pattern=r"^(hf|file)://.+", max_length=2000)]
    bytes: Positive | None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")] | None

    @property
    def local_path(self) -> str | None:
        """The path of a file:// url, relative to the folder of params.yaml or absolute; None for an hf:// url."""
        return self.url.removeprefix("file://") if self.url.startswith("file://") else None


def _pin_tag(value) -> str:
    return "Pins" if isinstance(value, list) else "Pin"


class Download(StrictModel):
    mirror: str
    images: Literal["all", "selected"]
    inputs: dict[
        str, Annotated[Annotated[Pin, Tag("Pin")] | Annotated[list[Pin], Tag("Pins")], Discriminator(_pin_tag)]
    ]

    def pins(self, name: str) -> list[Pin]:
        """The pins of the input `name`, in their order; empty if the recipe does not have it."""
        pinned = self.inputs.get(name, [])
        return pinned if isinstance(pinned, list) else [pinned]

    @property
    def all_pins(self) -> list[tuple[str, Pin]]:
        """(name of its input, pin) of every pin."""
        return [(name, pin) for name in self.inputs for pin in self.pins(name)]

    @model_validator(mode="after")
    def _one_source_of_posts(self):
        if "posts" in self.inputs and "database" in self.inputs:
            raise ValueError(
                "inputs has both posts and database; the database is made from posts (posts.json), so keep one of them"
            )
        return self

    @model_validator(mode="after")
    def _one_file(self):
        for name in ("posts", NETWORK_WEIGHTS):
            if isinstance(self.inputs.get(name), list):
                raise ValueError(f"inputs.{name} is a list; it must be one file")
        return self


class Range(StrictModel):
    """Posts with from <= id < below (null: no upper end)."""

    from_: Count = Field(alias="from")
    below: Positive | None
    draw: Positive | Literal["all"]

    @model_validator(mode="after")
    def _holds_ids(self):
        if self.below is not None and self.below <= self.from_:
            raise ValueError(
                f"from is {self.from_} and below is {self.below}, so no id lies between; below is the first id excluded"
            )
        return self


class Selection(StrictModel):
    seed: Count  # Python's random draws with -1 what it draws with 1
    replacement: bool
    ranges: Annotated[list[Range], Field(min_length=1)]


class Filter(StrictModel):
    images: Annotated[list[str], Field(min_length=1)]
    image_check: Literal["header", "decode"]
    max_pixels: Positive
    max_aspect_ratio: Positive
    alpha_background: Annotated[list[Byte], Field(min_length=3, max_length=3)] | None
    exif_rotation: bool
    reencode_webp: bool

    @model_validator(mode="after")
    def _rotation_is_decoded(self):
        if self.exif_rotation and self.image_check == "header":
            raise ValueError(
                "exif_rotation: true exchanges width and height of some images, which image_check: header does not "
                "see; set filter.image_check to decode"
            )
        return self

    @model_validator(mode="after")
    def _reencoding_is_decoded(self):
        if self.reencode_webp and (self.image_check == "header" or self.max_pixels > 1 << 28):
            raise ValueError(
                "reencode_webp: true makes images smaller after they are decoded; it needs image_check: decode and "
                f"max_pixels of at most {1 << 28}"
            )
        return self


class Percentiles(StrictModel):
    """Percentiles of fav_count over all posts of a rating in the database, best first: thresholds that the stages
    compute (dataset/post_metadata.py:quality_thresholds).
    """

    percentiles: list[Annotated[int, Field(gt=0, lt=100)]]


def _thresholds_tag(value) -> str:
    from_database = isinstance(value, Percentiles) or (isinstance(value, dict) and "percentiles" in value)
    return "Percentiles" if from_database else "numbers"


class Caption(StrictModel):
    special: list[str]
    dropped_meta: list[str]
    dropped_artists: list[str]
    underscores_kept_up_to: Count
    years: Annotated[dict[int, str], BeforeValidator(_with_integer_keys)]
    first_year: int
    before_first_year: str | None
    ratings: Annotated[dict[Annotated[int, Field(ge=0, le=99)], list[str]], BeforeValidator(_with_integer_keys)]
    quality: Annotated[list[str], Field(min_length=1)]
    quality_above: Annotated[
        Annotated[dict[int, list[int]], BeforeValidator(_with_integer_keys), Tag("numbers")]
        | Annotated[Percentiles, Tag("Percentiles")],
        Discriminator(_thresholds_tag),
    ]
    no_quality_above_id: int | None
    separator: Text

    @field_validator("separator")
    @classmethod
    def _parts_tags_from_nothing(cls, separator: str) -> str:
        if "," in separator or not separator.strip():
            raise ValueError(
                f"{separator!r:.40} has a comma, or is a space: these stand between all tags, so the kept part would "
                'end at the first one. Choose a text that is in no tag, as "|||" is'
            )
        return separator

    @model_validator(mode="after")
    def _tables_fit(self):
        if list(self.years) != sorted(self.years):
            raise ValueError("years is not in ascending order; each year is the last one of its tag")
        if isinstance(self.quality_above, Percentiles):
            percentiles = self.quality_above.percentiles
            if len(percentiles) != len(self.quality) - 1 or percentiles != sorted(set(percentiles), reverse=True):
                raise ValueError(
                    f"quality_above.percentiles needs {len(self.quality) - 1} falling percentiles, one between each "
                    "two of the quality tags"
                )
            return self
        if self.quality_above.keys() != self.ratings.keys():
            raise ValueError(
                f"quality_above has the ratings {list(self.quality_above)}, ratings has {list(self.ratings)}; both "
                "need the same"
            )
        for rating, thresholds in self.quality_above.items():
            if len(thresholds) != len(self.quality) - 1 or thresholds != sorted(thresholds, reverse=True):
                raise ValueError(
                    f"quality_above.{rating} needs {len(self.quality) - 1} falling thresholds, one between each two of "
                    "the quality tags"
                )
        return self


class Merge(StrictModel):
    start: Literal["merge", "published"]
    weights: dict[Literal["gamma", "beta"], float]
    donor_embeddings: list[str]
    compute_dtype: Literal["float32", "float16"]
    output_dtype: Dtype
    extra_tensors: Literal["refuse", "drop"]


class Model(StrictModel):
    head_dim: Positive
    norm_groups: Positive
    vae_scaling_factor: Annotated[float, Field(gt=0)]
    side: Pixels


class Schedule(StrictModel):
    seed: Seed
    epochs: Annotated[int, Field(gt=0, le=10_000)]
    max_steps: Positive | None
    batch_size: Positive
    micro_batches: PositiveInt16
    lanes: PositiveInt16
    area: Positive
    min_side: Pixels
    max_side: Pixels
    side_step: Pixels

    @model_validator(mode="after")
    def _lanes_fit(self):
        if self.lanes & (self.lanes - 1):
            raise ValueError(f"lanes is {self.lanes}; the sum's fixed tree needs a power of two (1, 2, 4, 8 …)")
        if self.micro_batches % self.lanes:
            raise ValueError(f"micro_batches ({self.micro_batches}) is not a multiple of lanes ({self.lanes})")
        return self

    @model_validator(mode="after")
    def _buckets_exist(self):
        square = math.isqrt(self.area) // self.side_step * self.side_step
        if not self.min_side <= square <= self.max_side:
            raise ValueError(
                f"area {self.area} gives a square bucket of side {square} (in steps of side_step, {self.side_step}); "
                f"it must lie between min_side ({self.min_side}) and max_side ({self.max_side})"
            )
        return self


class Preset(StrictModel):
    modules: dict[str, Positive]
    names: dict[str, Positive]
    norms: bool


class Lokr(StrictModel):
    dim: Positive
    alpha: Annotated[int, Field(gt=0, lt=65520)]  # from 65520 on, fp16 rounds to infinity
    seed: Seed
    forward: Literal["factors", "delta"]
    dora: bool
    preset: Preset

    @model_validator(mode="after")
    def _dora_needs_delta(self):
        if self.dora and self.forward == "factors":
            raise ValueError(
                "dora: true scales the whole weight, which forward: factors never builds; set lokr.forward to delta"
            )
        return self


class Train(StrictModel):
    seed: Seed
    device: Literal["cpu", "cuda"]
    precision: Dtype
    weights: Literal["float32", "float16"]
    optimizer: Literal["Lion8bit"]
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)]
    weight_decay: Annotated[float, Field(ge=0)]
    learning_rate_unet: Annotated[float, Field(ge=0)]
    learning_rate_text: Annotated[float, Field(ge=0)]
    warmup_steps: Count
    last_step_divisor: Literal["full", "actual"]
    clip_norm: Annotated[float, Field(gt=0)]
    max_token_length: Annotated[int, Field(multiple_of=75, gt=0)]
    shuffle_caption: bool
    tag_dropout: Fraction
    noise_offset: Annotated[float, Field(ge=0)]
    min_snr_gamma: Annotated[float, Field(gt=0)]
    crop_conditioning: Literal["letterbox", "real"]
    timestep_freq_shift: Literal[0, 1]
    text_projection: Literal["sdxl", "transposed"]
    gradient_checkpointing: bool
    milestone_every: Positive

    @model_validator(mode="after")
    def _half_weights_are_scaled(self):
        if self.weights == "float16" and self.precision != "float16":
            raise ValueError(
                f"weights is float16 and precision is {self.precision}, which has no loss scale: gradients "
                "below 3e-8 would become 0. Set train.weights to float32, or train.precision to float16"
            )
        return self


class Execution(StrictModel):
    """How the training is run: settings that change time and place but no bits. No stage depends on them."""

    ranks: Positive
    workers: Count
    save_every: Positive
    keep_states: Positive
    work: str
    tensorboard: bool


class Bake(StrictModel):
    scale: float
    title: Text
    author: Text | None
    description: Text | None
    date: Text | None
    license: str | None

    @field_validator("date")
    @classmethod
    def _iso_date(cls, date: str | None) -> str | None:
        try:
            datetime.fromisoformat(date or "2000-01-01")
        except ValueError:
            raise ValueError(f"{date!r:.40} is not an ISO 8601 date such as 2024-03-05") from None
        return date


class Preview(StrictModel):
    seed: Seed
    steps: Annotated[int, Field(gt=0, le=1000)]  # of as many time steps
    guidance: float
    width: Pixels
    height: Pixels
    columns: Positive
    held_out: Count
    negative: str
    prompts: Annotated[list[str], Field(min_length=1)]


FileName = Annotated[str, Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9._-]*/)*[A-Za-z0-9_][A-Za-z0-9._-]*$")]


class Release(StrictModel):
    """The names of files in the folder that is published, with `/` between folders. No stage reads them."""

    final: FileName
    base: FileName
    lokr: FileName
    artists: FileName
    characters: FileName
    buckets: FileName
    training: FileName
    preset: FileName


class PublishedFile(StrictModel):
    """null: not known."""

    bytes: Positive | None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None


class PublishedDataset(StrictModel):
    posts: Positive
    steps: Positive
    buckets: list[Annotated[list[Positive], Field(min_length=3, max_length=3)]]  # width, height, images


class PublishedTraining(StrictModel):
    """What the release's training took: the time that preflight plans for the same GPUs."""

    gpus: Positive
    gpu: Text
    seconds_per_step: Annotated[float, Field(gt=0)]
    said: Text  # the figures as they were published


class Published(StrictModel):
    """What the release published: the targets of audit, report and preflight. No stage computes with it."""

    dataset: PublishedDataset
    training: PublishedTraining
    base: PublishedFile
    final: PublishedFile
    lokr: PublishedFile
    milestones: Annotated[dict[int, PublishedFile], BeforeValidator(_with_integer_keys)]  # the LoKr after so many steps


class Recipe(StrictModel):
    root: str
    requirements: Literal["cpu", "cuda"]
    supplied: Text
    download: Download
    selection: Selection
    filter: Filter
    caption: Caption
    merge: Merge
    model: Model
    schedule: Schedule
    lokr: Lokr
    train: Train
    execution: Execution
    bake: Bake
    preview: Preview
    release: Release
    published: Published | None


def load(path: Path | str) -> Recipe:
    """The recipe in a params.yaml. Raises UserError if it is missing, not YAML, or has wrong or unknown keys."""
    path = Path(path)
    return strict_model.validate(path, Recipe, yaml_file.read_yaml(path))
