"""Invariant: the model card says of a build what its lock and its outs say; the same build gives the same card, byte
for byte.

Markdown with Hugging Face's front matter; nothing is asked of the network.
"""

import json

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from kohaku_delta.errors import UserError
from kohaku_delta.hub import pins
from kohaku_delta.report import build_summary as builds
from kohaku_delta.report import markdown, table_rows
from kohaku_delta.report.build_summary import Build

LICENSES = {
    "Fair AI Public License 1.0-SD": ("fair-ai-public-license-1.0-sd", "https://freedevproject.org/faipl-1.0-sd/")
}
PARENTS = {"merge": ("beta", "gamma", "sdxl"), "published": ("delta_base",)}
STRETCH = 4  # steps that the card proposes to compute anew


def render_card(build: Build) -> str:
    """The whole card. Refuses a build that is not finished."""
    front, body = parts(build)
    return ModelCard(
        f"---\n{front}\n---\n\n{body.rstrip()}\n"
    ).content  # reads the front matter back, and refuses what is none


def parts(build: Build) -> tuple[str, str]:
    """Front matter and body of the card."""
    final = build.out(builds.WEIGHTS["final"])
    missing = [
        name for name, found in (("bake", final), ("statistics", build.dataset), ("train", build.curves)) if not found
    ]
    if missing:
        raise UserError(
            f"{builds.FOLDER}/ is not finished: there is nothing of {', '.join(missing)}. Run `dvc repro` first; a card is of a whole build."
        )
    shapes = Environment(
        loader=PackageLoader("kohaku_delta.report", ""), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shapes.filters |= {"plain": markdown.to_plain, "block": markdown.code_block, "number": table_rows.format_number}
    recipe = build.recipe
    body = shapes.get_template("card.md").render(
        build=build, recipe=recipe, caption=recipe.caption, preview=recipe.preview, title=recipe.bake.title, files=builds.WEIGHTS,
        images=f"{build.dataset.trained:,}", final_size=table_rows.format_size(final.size), training=table_rows.training(build), quality=table_rows.quality(build),
        years=table_rows.years(build), inputs=_inputs(build), snippet=_snippet(build), checks=_checks(build),
        link=LICENSES.get(recipe.bake.license, (None, None))[1],
    )  # fmt: skip
    return _front_matter(build).to_yaml(), body


def _front_matter(build: Build) -> ModelCardData:
    recipe, name = build.recipe, build.recipe.bake.license
    short, link = LICENSES.get(name, (name, None))
    parents, sets = [], []
    for key, pin in recipe.download.inputs.items():
        first = pin[0] if isinstance(pin, list) else pin
        if first.url.startswith("hf://"):
            place = pins.hub_file(first)
            if place.kind == "dataset":
                sets.append(place.repo)
            elif key in PARENTS[recipe.merge.start]:
                parents.append(place.repo)
    return ModelCardData(
        base_model=sorted(set(parents)) or None,
        datasets=sorted(set(sets)) or None,
        language=["en"],
        library_name="diffusers",
        license="other" if name else None,
        license_name=short,
        license_link=link,
        pipeline_tag="text-to-image",
        tags=[
            "stable-diffusion-xl",
            "text-to-image",
            "anime",
            "lokr",
            "reproducible",
            *(["miniature"] if build.miniature else []),
        ],
    )


def _inputs(build: Build) -> list[tuple[str, int, int, str | None, str]]:
    """(name, files, bytes, sha256 of a single file, how the recipe holds it) of each input."""
    rows = []
    for name in dict.fromkeys(source.name for source in build.sources):
        files = [source for source in build.sources if source.name == name]
        held = list(dict.fromkeys(source.pin for source in files))
        rows.append(
            (
                name,
                len(files),
                sum(source.bytes for source in files),
                files[0].sha256 if len(files) == 1 else None,
                "; ".join(held),
            )
        )
    return rows


def _snippet(build: Build) -> str:
    preview, cuda = build.recipe.preview, build.recipe.train.device == "cuda"
    quoted = {"prompt": preview.prompts[0], "negative_prompt": preview.negative}
    settings = {name: json.dumps(value, ensure_ascii=False) for name, value in quoted.items()}
    settings |= {
        "width": preview.width,
        "height": preview.height,
        "num_inference_steps": preview.steps,
        "guidance_scale": preview.guidance,
    }
    lines = "".join(f"    {name}={value},\n" for name, value in settings.items())
    kind, place = (build.recipe.merge.output_dtype, '.to("cuda")') if cuda else ("float32", "")
    return (
        "import torch\nfrom diffusers import StableDiffusionXLPipeline\n\n"
        f'pipeline = StableDiffusionXLPipeline.from_pretrained("diffusers", torch_dtype=torch.{kind}){place}\n'
        f'pipeline(\n{lines}).images[0].save("picture.png")'
    )


def _checks(build: Build) -> str:
    """Commands, for the recipe's folder; the stretch starts at the last milestone, whose state is kept."""
    every, steps = build.recipe.execution.milestone_every, table_rows.steps(build)
    first = (steps - 1) // every * every
    return "\n".join(
        [
            "kohaku-delta audit",
            f"kohaku-delta tensors build/{builds.WEIGHTS['final']} other.safetensors",
            f"kohaku-delta replay --from {first} --to {min(first + STRETCH, steps) - 1}",
        ]
    )
