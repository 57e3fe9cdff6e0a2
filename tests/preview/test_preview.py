"""The preview compares like with like: the same noise, the same posts, none of them trained on. The distance is a
closed form where one exists.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from kohaku_delta.dataset import selection
from kohaku_delta.errors import UserError
from kohaku_delta.params import load
from kohaku_delta.preview import image_grid, picture_distance, references, sampler
from kohaku_delta.training import diffusion, sample_rng

ROOT = Path(__file__).resolve().parents[2]
MINIATURE = ROOT / "miniature"


def test_held_out_posts_were_not_selected():
    ids, selected = np.arange(1000), np.arange(0, 1000, 2)
    chosen = selection.held_out(ids, selected, 1337, 50)
    assert len(set(chosen.tolist())) == 50 and (chosen % 2 == 1).all() and (np.diff(chosen) > 0).all()
    assert (chosen == selection.held_out(ids[::-1], selected[::-1], 1337, 50)).all()
    assert len(selection.held_out(ids, selected, 1337, 5000)) == 500


class Linear:
    """A stand-in for SDXL whose ε is a fixed multiple of x: the sampler's arithmetic is all that is left."""

    device, precision, vae_scaling, end_token = "cpu", torch.float32, 0.13025, 0
    amplitudes = diffusion.amplitudes(torch.float32)

    def __init__(self):
        self.seen = []
        self.models = {"unet": self.unet, "te1": None, "te2": None, "vae": self}

    def conditions(self, *ids):
        return None, torch.zeros(1)

    def unet(self, x, step, context, added_cond_kwargs, return_dict):
        self.seen.append(x[:1].clone())
        return (x * torch.cat([torch.full((len(x) // 2, 1, 1, 1), 0.9), torch.full((len(x) // 2, 1, 1, 1), 0.5)]),)

    def decode(self, z, return_dict):
        return (z.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1),)


def test_the_sampler_is_ddim_with_guidance(monkeypatch):
    monkeypatch.setattr(sampler.conditioning, "token_chunks", lambda *arguments: torch.zeros(3, 77, dtype=torch.int64))
    parameters = load("miniature/params.yaml").preview.model_copy(
        update={"prompts": ["circle"], "steps": 10, "guidance": 3.0}
    )
    token = type("Token", (), {"eos_token_id": 0})
    model = Linear()
    sampler.sample_images(model, (token, token), parameters, 8, 225)

    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(10)
    x = torch.from_numpy(sample_rng.normal_for((4, 16, 16), parameters.seed, 0, sample_rng.NOISE))[None]
    for seen, time in zip(model.seen, theirs.timesteps, strict=True):
        assert torch.allclose(seen, x, atol=1e-4)
        x = theirs.step((0.5 + 3.0 * 0.4) * x, time, x, eta=0.0).prev_sample
    assert len(model.seen) == 10


def test_the_grid_is_a_png_that_depends_on_its_pictures_only():
    pictures = [np.full((128, 96, 3), 40 * index, np.uint8) for index in range(3)]
    shown = {"base": pictures, "final": pictures[::-1], "drawing": pictures}
    distances = picture_distance.mean_distances({"base": pictures, "final": pictures[::-1]}, pictures)
    prompts = ["circle, red body", "star", "a long prompt " * 9]
    drawn = image_grid.draw_grid(prompts, shown, distances, 2, "held-out loss")
    assert drawn[:8] == b"\x89PNG\r\n\x1a\n"
    assert (
        drawn
        == image_grid.draw_grid(prompts, shown, distances, 2, "held-out loss")
        != image_grid.draw_grid(prompts, shown, {}, 2, "held-out loss")
    )


def plain(*colour) -> np.ndarray:
    return np.full((32, 48, 3), colour, np.uint8)


def cielab(colour) -> tuple[float, float, float]:
    """L*, a*, b* of an sRGB colour by CIE's formulas, white D65."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in colour)]
    rows = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
    x, y, z = (
        sum(part * value for part, value in zip(row, linear, strict=True)) / white
        for row, white in zip(rows, (0.950456, 1.0, 1.088754), strict=True)
    )
    fx, fy, fz = (value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


@pytest.mark.parametrize(
    "one, other",
    [
        ((222, 44, 44), (48, 92, 224)),
        ((0, 0, 0), (255, 255, 255)),
        ((248, 214, 48), (128, 128, 128)),
        ((10, 200, 90), (12, 190, 80)),
    ],
)
def test_the_distance_of_two_flat_pictures_is_delta_e_of_their_colours(one, other):
    expected = math.dist(cielab(one), cielab(other))
    assert (
        abs(picture_distance.distance(plain(*one), plain(*other)) - expected) < 1.8
    )  # Lab in 8 bits: half a level a channel and picture
    assert picture_distance.distance(plain(*one), plain(*one)) == 0.0


def test_the_distance_is_symmetric_and_the_mean_over_pixels():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
    assert picture_distance.distance(*pictures) == picture_distance.distance(*pictures[::-1]) > 0
    half = plain(222, 44, 44)
    half[:, 24:] = (48, 92, 224)
    share = picture_distance.distance(half, plain(222, 44, 44)) / picture_distance.distance(
        plain(48, 92, 224), plain(222, 44, 44)
    )
    assert abs(share - 0.5) < 0.02


def test_the_blur_tolerates_a_shifted_edge_but_not_a_shifted_figure():
    y, x = np.mgrid[:128, :128]

    def disc(centre: int) -> np.ndarray:
        return np.where(
            ((x - centre) ** 2 + (y - 64) ** 2 < 30**2)[..., None], np.uint8([222, 44, 44]), np.uint8([48, 92, 224])
        ).astype(np.uint8)

    near, far = (picture_distance.distance(disc(48), disc(48 + shift)) for shift in (1, 32))
    flat = picture_distance.distance(disc(48), picture_distance.mean_color_picture(disc(48)))
    assert near < 0.1 * flat and far > 0.5 * flat


def test_a_flat_picture_has_the_mean_colour():
    picture = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    assert (picture_distance.mean_color_picture(picture) == np.floor(picture.reshape(-1, 3).mean(axis=0) + 0.5)).all()


RECIPE = load(MINIATURE / "params.yaml")
PREVIEW = RECIPE.preview


def drawn(prompt: str) -> np.ndarray:
    from make_miniature import references as drawings

    return drawings.draw(drawings.scene_of(prompt, 128, 128))


def test_the_references_are_what_the_drawing_code_draws():
    for number, prompt in enumerate(PREVIEW.prompts):
        assert (
            np.asarray(Image.open(ROOT / "data" / "references" / f"reference-{number:02d}.png")) == drawn(prompt)
        ).all(), prompt


def test_the_drawing_code_draws_what_a_prompt_says():
    from make_miniature.words import COLOURS

    picture = drawn("1girl, solo, square, blue body, full body, right side, simple background, yellow background")
    assert (picture[64, 94] == COLOURS["blue"]).all() and (picture[64, 30] == COLOURS["yellow"]).all()
    left = drawn("1boy, male focus, solo, square, green body, full body, left side, simple background, red background")
    assert (left[64, 34] == COLOURS["green"]).all() and (left[64, 98] == COLOURS["red"]).all()
    two = drawn("2girls, multiple girls, circle, black body, simple background, orange background")
    assert [(two[64, x] == COLOURS["black"]).all() for x in (32, 64, 96)] == [True, False, True]
    assert (drawn("no humans, simple background, aqua background") == COLOURS["aqua"]).all()
    assert (
        drawn("no humans, scenery, outdoors, night sky")[:60].mean()
        < 90
        < drawn("no humans, scenery, outdoors, blue sky")[:60].mean()
    )
    close, wide = (
        drawn(f"no humans, circle, red body, {size}, centered, white background") for size in ("close-up", "wide shot")
    )
    assert (close == COLOURS["red"]).all(axis=2).sum() > 3 * (wide == COLOURS["red"]).all(axis=2).sum() > 0


def test_words_about_quality_date_artist_and_character_change_the_drawing():
    prompt = "1girl, solo, circle, red body, centered, blue sky"
    others = ("worst quality", "old", "grey heron", "marumi (shape quest)", "smile", "close-up")
    assert len({drawn(prompt).tobytes(), *(drawn(f"{prompt}, {word}").tobytes() for word in others)}) == 1 + len(others)
    assert (drawn(f"{prompt}, safe, solo, outdoors") == drawn(prompt)).all()


def test_a_word_that_no_drawing_shows_is_refused():
    with pytest.raises(ValueError, match="two left feet"):
        drawn("1girl, circle, two left feet")


def test_no_prompt_is_a_caption_of_the_training():
    """Compared as sets of words, so that another order is no other caption."""
    from kohaku_delta.danbooru.database import Database
    from kohaku_delta.dataset import captions, selection

    recipe, database = load(MINIATURE / "params.yaml"), Database(ROOT / "data" / "danbooru2023.db")
    selected = np.unique(selection.select(database, recipe.selection)["post_id"].to_numpy())
    possible = selected[captions.captionable(database, selected, recipe.caption)]
    texts = captions.caption_posts(database, possible, recipe.caption)["caption"].to_pylist()
    trained = {
        frozenset(
            word.strip() for part in text.split(recipe.caption.separator) for word in part.split(",") if word.strip()
        )
        for text in texts
    }
    assert len(trained) > 1000
    assert not trained & {frozenset(word.strip() for word in prompt.split(",")) for prompt in PREVIEW.prompts}


def test_references_that_do_not_fit_the_prompts_are_refused(tmp_path):
    parameters = PREVIEW.model_copy(update={"prompts": ["circle", "square"], "width": 48, "height": 32})
    Image.fromarray(plain(1, 2, 3)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="1 pictures and preview.prompts has 2 prompts"):
        references.read_references(parameters, None, tmp_path)
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="1.png.*cannot be read"):
        references.read_references(parameters, None, tmp_path)
    Image.fromarray(plain(1, 2, 3)[:, :40]).save(tmp_path / "1.png")
    with pytest.raises(UserError, match="40×32; preview.width and preview.height say 48×32"):
        references.read_references(parameters, None, tmp_path)
    Image.fromarray(plain(1, 2, 3)).save(tmp_path / "1.png")
    assert [(each == (1, 2, 3)).all() for each in references.read_references(parameters, None, tmp_path)] == [
        True,
        True,
    ]


def test_a_recipe_without_references_has_no_distance(tmp_path):
    (tmp_path / "inputs.json").write_text(json.dumps({"inputs": {}, "start": "merge"}))
    assert references.read_references(PREVIEW, tmp_path / "inputs.json", None) is None
    with pytest.raises(UserError, match="does not exist"):
        references.read_references(PREVIEW, tmp_path / "nothing.json", None)


def test_training_brings_the_pictures_closer_to_their_drawings():
    """For the miniature built here: a smaller mean distance than the base's and at most 0.8 of it on six prompts, as
    the README says; a flat picture farther than both on every prompt, and a lower loss.
    """
    if not (file := MINIATURE / "build" / "held-out.json").is_file():
        pytest.skip("the miniature is not built here: run `make repro` first")
    measured = json.loads(file.read_text())
    base, final, flat = (measured[name]["distance"] for name in ("base", "final", "flat"))
    prompts = [name for name in base if name != "mean"]
    assert len(prompts) == len(PREVIEW.prompts)
    assert final["mean"] < base["mean"] and sum(final[name] <= 0.8 * base[name] for name in prompts) == 6
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"goes from {base['mean']:.1f} to {final['mean']:.1f}" in readme
    assert all(final[name] < base[name] for name in prompts)
    assert all(max(base[name], final[name]) < flat[name] for name in prompts)
    assert measured["final"]["loss"]["sdxl"] < measured["base"]["loss"]["sdxl"] <= 0.3826


@pytest.mark.parametrize(
    "held_out, selected, reason",
    [
        (64, "all", "every post of the tars was selected"),
        (0, "none", "preview.held_out is 0"),
        (5, "none", "none of the 5 held-out posts has an image and a caption"),
    ],
)
def test_without_a_post_to_measure_on_the_reason_is_given(tmp_path, held_out, selected, reason):
    from danbooru_factory import picture, write_database, write_tar
    from kohaku_delta.danbooru.database import Database
    from kohaku_delta.preview import checkpoint_measurement

    ids = list(range(1000, 31_000, 1000))
    database = Database(
        write_database(tmp_path / "own.db", [{"id": post} for post in ids], [(1, "a", 0)], [(post, 1) for post in ids])
    )
    tar = write_tar(tmp_path / "data-0000.tar", [("7000000.webp", picture())])
    recipe = RECIPE.model_copy(update={"preview": PREVIEW.model_copy(update={"held_out": held_out})})
    posts, why = checkpoint_measurement.held_out_posts(
        recipe, database, {0: tar}, np.array(ids if selected == "all" else [])
    )
    assert posts.num_rows == 0 and why == reason
