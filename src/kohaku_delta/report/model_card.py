"""The model card of a build, in Markdown with Hugging Face's front matter, from dvc.lock and the outputs alone.

The same build gives the same card, byte for byte; nothing is asked of the network.
"""

import json

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from kohaku_delta import paths
from kohaku_delta.errors import UserError
from kohaku_delta.hub import pins
from kohaku_delta.params import NETWORK_WEIGHTS
from kohaku_delta.printing import printable_page
from kohaku_delta.report import build_summary, markdown, table_rows
from kohaku_delta.report.build_summary import Build
from kohaku_delta.units import format_size

LICENSES = {
    "Fair AI Public License 1.0-SD": ("fair-ai-public-license-1.0-sd", "https://freedevproject.org/faipl-1.0-sd/")
}
PARENTS = {"merge": ("beta", "gamma", "sdxl"), "published": ("delta_base",)}
FILES = build_summary.WEIGHTS | {
    "artists": "artists-kxl-delta.json",
    "characters": "characters-kxl-delta.json",
    "pipeline": "diffusers",
}  # as the card of build/ names them
REPLAYED = 4  # steps in the card's example of a replay


def render_card(build: Build, files: dict[str, str] = FILES) -> str:
    """The whole card. files: the names of what it describes, seen from its folder, with the keys of FILES, and `bom`
    where a bill of materials lies beside it. Refuses a build that is not finished.
    """
    front_matter, body = card_parts(build, files)
    card = ModelCard(printable_page(f"---\n{front_matter}\n---\n\n{body.rstrip()}\n"))  # parses the front matter again
    return card.content


def card_parts(build: Build, files: dict[str, str] = FILES) -> tuple[str, str]:
    """Front matter and body of the card. Refuses a build that is not finished."""
    final, dataset, steps = build.output(build_summary.WEIGHTS["final"]), build.dataset, build.steps
    if not final or not dataset or not steps:
        missing = [name for name, found in (("bake", final), ("statistics", dataset), ("train", steps)) if not found]
        raise UserError(
            f"{paths.BUILD}/ is not finished: there is nothing of {', '.join(missing)}. "
            "Run `dvc repro` first; a card describes a whole build."
        )
    templates = Environment(
        loader=PackageLoader("kohaku_delta.report", ""), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= {"plain": markdown.to_plain, "block": markdown.code_block, "number": table_rows.format_number}
    body = templates.get_template("card.md").render(
        build=build,
        recipe=build.recipe,
        caption=build.recipe.caption,
        preview=build.recipe.preview,
        title=build.recipe.bake.title,
        files=files,
        images=f"{dataset.trained:,}",
        final_size=format_size(final.size),
        training=table_rows.training(build),
        milestones=table_rows.milestones(build),
        quality=table_rows.quality_tags(build),
        years=table_rows.date_tags(build),
        inputs=_inputs(build),
        snippet=_snippet(build, files["pipeline"]),
        checks=_checks(build, steps),
        link=license_link(build),
    )
    return _front_matter(build).to_yaml(), body


def license_link(build: Build) -> str | None:
    """The text of the model's license, if it is a known one."""
    name = build.recipe.bake.license
    return LICENSES[name][1] if name in LICENSES else None


def _front_matter(build: Build) -> ModelCardData:
    recipe, name = build.recipe, build.recipe.bake.license
    base_models, datasets = set(), set()
    for key in recipe.download.inputs:
        first = recipe.download.pins(key)[0]
        if not first.local_path:
            source = pins.hub_file(first)
            if source.kind == "dataset":
                datasets.add(source.repo)
            elif key in (*PARENTS[recipe.merge.start], NETWORK_WEIGHTS):
                base_models.add(source.repo)
    tags = ["stable-diffusion-xl", "text-to-image", "anime", "lokr", "reproducible"]
    return ModelCardData(
        base_model=sorted(base_models) or None,
        datasets=sorted(datasets) or None,
        language=["en"],
        library_name="diffusers",
        license="other" if name else None,
        license_name=LICENSES[name][0] if name in LICENSES else name,
        license_link=license_link(build),
        pipeline_tag="text-to-image",
        tags=tags + (["miniature"] if build.is_miniature else []),
    )


def _inputs(build: Build) -> list[tuple[str, int, int, str | None, str]]:
    """(name, files, bytes, sha256 of a single file, how the recipe pins it) of each input."""
    rows = []
    for name in dict.fromkeys(source.name for source in build.sources):
        files = [source for source in build.sources if source.name == name]
        sha256 = files[0].sha256 if len(files) == 1 else None
        status = "; ".join(dict.fromkeys(source.pin for source in files))
        rows.append((name, len(files), sum(source.bytes for source in files), sha256, status))
    return rows


def _snippet(build: Build, pipeline: str) -> str:
    """Python that draws the preview's first prompt with diffusers."""
    preview, cuda = build.recipe.preview, build.recipe.train.device == "cuda"
    arguments = {
        "prompt": json.dumps(preview.prompts[0], ensure_ascii=False),
        "negative_prompt": json.dumps(preview.negative, ensure_ascii=False),
        "width": preview.width,
        "height": preview.height,
        "num_inference_steps": preview.steps,
        "guidance_scale": preview.guidance,
    }
    lines = "".join(f"    {name}={value},\n" for name, value in arguments.items())
    dtype, to_device = (build.recipe.merge.output_dtype, '.to("cuda")') if cuda else ("float32", "")
    return (
        "import torch\nfrom diffusers import StableDiffusionXLPipeline\n\n"
        f'pipeline = StableDiffusionXLPipeline.from_pretrained("{pipeline}", torch_dtype=torch.{dtype}){to_device}\n'
        f'pipeline(\n{lines}).images[0].save("picture.png")'
    )


def _checks(build: Build, steps: int) -> str:
    """Commands for the recipe's folder; the replay starts at the last milestone, whose state is kept."""
    every = build.recipe.train.milestone_every
    first = (steps - 1) // every * every
    return "\n".join(
        [
            "kohaku-delta audit",
            f"kohaku-delta tensors build/{build_summary.WEIGHTS['final']} other.safetensors",
            f"kohaku-delta replay --from {first} --to {min(first + REPLAYED, steps) - 1}",
        ]
    )
