"""The model card says what a build's lock and outs say, is read by Hugging Face's own library, and asks nothing of the
network.
"""

import ast
import hashlib
import json
import socket

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from ruamel.yaml import YAML

import build_factory
from kohaku_delta.cli.main import main


def card(place) -> str:
    done = CliRunner().invoke(main, ["card", str(place)])
    assert done.exit_code == 0, done.output
    return (place / "build" / "README.md").read_text(encoding="utf-8")


def matter(text: str) -> dict:
    return YAML(typ="safe", pure=True).load(text.split("---\n")[1])


def row(text: str, name: str) -> str:
    """The second cell of the table row that begins with `name`."""
    return next(
        line.split(" | ", 1)[1].removesuffix(" |") for line in text.splitlines() if line.startswith(f"| {name} | ")
    )


def fences(text: str, language: str) -> list[str]:
    return [
        token.content
        for token in MarkdownIt().parse(text.split("---\n", 2)[2])
        if token.type == "fence" and token.info == language
    ]


def release() -> dict:
    return YAML(typ="safe", pure=True).load((build_factory.ROOT / "params.yaml").read_text()) | {
        "root": str(build_factory.ROOT)
    }


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError("a card asks nothing of the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_the_miniatures_card_says_plainly_what_it_is(tmp_path):
    text = card(build_factory.make(tmp_path))
    assert "**This is the miniature, not Kohaku XL Delta.**" in text
    assert "miniature" in matter(text)["tags"] and "license" not in matter(text) and "base_model" not in matter(text)
    assert "The recipe names no license for this model." in text


def test_the_releases_card_has_the_front_matter_that_the_hub_reads(tmp_path):
    text = card(build_factory.make(tmp_path, release()))
    assert "miniature" not in text.lower()
    assert matter(text) == {
        "language": ["en"],
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "other",
        "license_name": "fair-ai-public-license-1.0-sd",
        "license_link": "https://freedevproject.org/faipl-1.0-sd/",
        "base_model": ["nnnn1111/models", "stabilityai/stable-diffusion-xl-base-1.0"],
        "datasets": [
            "KBlueLeaf/danbooru2023-sqlite",
            "KBlueLeaf/danbooru2023-webp-4Mpixel",
            "deepghs/danbooru2023-webp-4Mpixel_index",
        ],
        "tags": ["stable-diffusion-xl", "text-to-image", "anime", "lokr", "reproducible"],
    }
    read = ModelCard(text)
    assert read.data.to_dict() == matter(text) and read.text.lstrip().startswith("# Kohaku XL Delta rev1\n")
    assert row(text, "gamma").endswith("| pinned by 10 digits") and row(text, "tars (3 files)").endswith(
        "recorded at first download"
    )


def test_a_start_from_the_published_base_names_it(tmp_path):
    params = release()
    params["merge"]["start"] = "published"
    text = card(build_factory.make(tmp_path, params))
    assert (
        matter(text)["base_model"] == ["KBlueLeaf/Kohaku-XL-Delta"] and row(text, "Start") == "the published delta base"
    )


def test_a_training_that_began_with_a_lokr_names_it(tmp_path):
    params = release()
    url = f"hf://owner/other@{'a' * 40}/lyco-ckpts/lyco-step00002000.safetensors"
    entry = {"url": url, "bytes": 7, "sha256": "b" * 64}
    params["download"]["inputs"]["network_weights"] = entry
    place = build_factory.make(tmp_path, params)
    listed = json.loads((place / "build" / "inputs.json").read_text())
    listed["inputs"]["network_weights"] = entry | {"pinned": "sha256", "path": "x"}
    (place / "build" / "inputs.json").write_text(json.dumps(listed))
    text = card(place)
    assert f"with the LoKr lyco-step00002000.safetensors (sha256 {'b' * 64}); optimizer" in row(text, "Start")
    assert "owner/other" in matter(text)["base_model"] and f"`{'b' * 64}` | pinned" in text


def test_figures_are_those_of_the_lock_and_of_the_outs(tmp_path):
    """The card's numbers of the model card of the release, from its params.yaml; posts and steps from what the stages
    wrote.
    """
    place = build_factory.make(tmp_path, release())
    text = card(place)
    assert row(text, "Batch").startswith("128 images per step (4 × 32 micro-batches")
    assert row(text, "Optimizer") == "Lion8bit, betas 0.9, 0.95, weight decay 0.1"
    assert row(text, "Learning rate") == "U-Net 4e-05, both text encoders 1e-05; constant after 50 warm-up steps"
    assert row(text, "Images") == "9 posts, of 11 selected by 12 draws" and row(text, "Steps") == "5 (1 epoch)"
    assert "buckets of the area of 1024 × 1024 pixels, sides 256 to 4096 in steps of 64; 2 of 97 buckets" in row(
        text, "Resolution"
    )
    assert "0.5000 of the base, 0.2500 after the training" in text
    changed = release()
    changed["train"].update(learning_rate_unet=0.5, seed=99)
    build_factory.write_params(place, changed)
    assert card(place) == text


def test_the_tags_are_those_that_captions_had(tmp_path):
    text = card(build_factory.make(tmp_path, release()))
    assert row(text, "masterpiece") == "safe > 37, sensitive > 81, nsfw > 182, explicit + nsfw > 262"
    assert row(text, "worst quality") == "safe ≤ 1, sensitive ≤ 2, nsfw ≤ 8, explicit + nsfw ≤ 9"
    assert (
        row(text, "newest") == "2021 to 2024"
        and row(text, "old") == "2005 to 2010"
        and row(text, "early") == "before 2005, and unreadable dates"
    )
    assert "| early | 2011 to 2014 |" in text and "Ratings: safe; sensitive; nsfw; explicit, nsfw." in text
    assert (
        "<1girl/1boy/1other/...>, <character>, <series>, <artists>, <special tags>, <general tags>"
        in fences(text, "")[0]
    )


def test_the_snippet_is_python_whatever_the_prompt(tmp_path):
    params = release()
    params["preview"]["prompts"][0] = prompt = 'a ``` b ````"""\n\\" é 初音 ' + "'"
    [code] = fences(card(build_factory.make(tmp_path, params)), "python")
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    given = {word.arg: word.value for call in calls for word in call.keywords}
    assert ast.literal_eval(given["prompt"]) == prompt and ast.literal_eval(given["width"]) == 1024
    assert ast.unparse(given["torch_dtype"]) == "torch.float16"


def test_the_checks_are_commands_that_there_are(tmp_path):
    [block] = fences(card(build_factory.make(tmp_path)), "sh")
    for line in block.splitlines():
        program, command, *options = line.split()
        assert program == "kohaku-delta" and command in main.list_commands(None)
        known = {name for each in main.get_command(None, command).params for name in each.opts}
        assert {option for option in options if option.startswith("-")} <= known


def test_a_card_names_its_weights_and_its_provenance(tmp_path):
    place = build_factory.make(tmp_path / "a")
    text = card(place)
    for name in ("delta-base.safetensors", "delta-lokr.safetensors", "kohaku-xl-delta.safetensors"):
        content = (place / "build" / name).read_bytes()
        assert f"| `{name}` | {len(content)} | `{hashlib.sha256(content).hexdigest()}` |" in text
    assert "no `provenance.json` was made" in text
    (place / "provenance.json").write_bytes(b"{}")
    assert f"`provenance.json`, sha256 `{hashlib.sha256(b'{}').hexdigest()}`" in card(place)


def test_the_release_says_which_of_its_files_are_the_published_ones(tmp_path):
    params = release()
    params["published"]["lokr"]["sha256"] = hashlib.sha256(b"delta-lokr.safetensors" * 20).hexdigest()
    text = card(build_factory.make(tmp_path, params))
    assert row(text, "`delta-lokr.safetensors`").endswith("| the same")
    assert row(text, "`kohaku-xl-delta.safetensors`").endswith(
        f"| different: `{params['published']['final']['sha256']}`"
    )


def test_a_card_is_the_same_bytes_in_another_place(tmp_path):
    assert card(build_factory.make(tmp_path / "a")) == card(build_factory.make(tmp_path / "b" / "c"))


def test_the_card_of_an_own_recipe_calls_it_neither_the_release_nor_the_miniature(tmp_path):
    own = build_factory.recipe()
    own["download"]["inputs"]["database"]["url"] = "file://data/own.db"
    own["bake"]["title"] = "My shapes"
    nothing = {"held-out.json": '{"posts": 0, "reason": "every post of the database was selected"}'}
    text = card(build_factory.make(tmp_path, own, texts=nothing))
    assert (
        "**This is not Kohaku XL Delta.** It is the model of another recipe" in text
        and "miniature" not in text.partition("## What it is made of")[0].lower()
    )
    assert "There is no held-out loss: every post of the database was selected." in text
