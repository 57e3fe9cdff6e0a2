import hashlib
import json
import random
import re
import string
import subprocess
import sys
from pathlib import Path

import ftfy
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_sdxl
from kohaku_delta.errors import UserError
from kohaku_delta.sdxl import model_loading
from kohaku_delta.sdxl.tokenizer import ClipTokenizer
from kohaku_delta.weights import export_diffusers

PROMPTS = json.loads(Path("tests/sdxl/hand_written_prompts.json").read_text())  # ten kinds, 70 of each


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A CLIP tokenizer of 1000 tokens: printable characters, and fillers."""
    folder = tmp_path_factory.mktemp("tokenizer")
    singles = ["!", *(c for c in string.printable if c not in "!" + string.whitespace)]
    words = singles + [c + "</w>" for c in singles]
    words += [f"filler{i}" for i in range(998 - len(words))] + [export_diffusers.BEGIN, export_diffusers.END]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder / "vocab.json", folder / "merges.txt"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    tiny_sdxl.write(folder / "model.safetensors", 9)
    export_diffusers.export(
        folder / "model.safetensors",
        {"tokenizer": tokenizer, "tokenizer_2": tokenizer},
        tiny_sdxl.MODEL,
        folder / "diffusers",
    )
    return folder


def test_pipeline_loads_offline_with_the_single_files_numbers_and_sdxls_scaling_factor(exported, monkeypatch):
    from diffusers import StableDiffusionXLPipeline

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        exported / "diffusers", local_files_only=True, dtype=torch.float32
    )
    assert pipeline.vae.config.scaling_factor == 0.13025 and pipeline.unet.config.sample_size == 16
    models = model_loading.load(exported / "model.safetensors", tiny_sdxl.MODEL)
    for part, theirs in (
        ("unet", pipeline.unet),
        ("te1", pipeline.text_encoder),
        ("te2", pipeline.text_encoder_2),
        ("vae", pipeline.vae),
    ):
        ours = models[part].state_dict()
        assert ours.keys() == theirs.state_dict().keys()
        assert all(torch.equal(value, theirs.state_dict()[path]) for path, value in ours.items())
        if part.startswith("te"):
            assert (
                theirs.config.eos_token_id == 999 and theirs.config.hidden_act == tiny_sdxl.CONFIGS[part]["hidden_act"]
            )
    assert (
        pipeline.tokenizer_2.pad_token_id == 0
        and pipeline.tokenizer.pad_token_id == 999
        and pipeline.tokenizer.model_max_length == 77
    )
    image = pipeline(
        "1girl",
        negative_prompt="bad",
        num_inference_steps=2,
        output_type="np",
        generator=torch.Generator().manual_seed(1),
    ).images
    assert image.shape == (1, 128, 128, 3)


@pytest.mark.parametrize(
    "pipeline, options",
    [
        ("AutoPipelineForText2Image", {}),
        ("DiffusionPipeline", {}),
        ("DiffusionPipeline", {"torch_dtype": torch.float16}),
        ("DiffusionPipeline", {"dtype": torch.bfloat16}),
        ("DiffusionPipeline", {"torch_dtype": torch.float32}),
    ],
)
def test_every_usual_way_to_load_the_folder_gives_one_dtype_and_draws(exported, pipeline, options):
    import diffusers

    loaded = getattr(diffusers, pipeline).from_pretrained(exported / "diffusers", local_files_only=True, **options)
    parts = (loaded.unet, loaded.vae, loaded.text_encoder, loaded.text_encoder_2)
    assert {part.dtype for part in parts} == {next(iter(options.values()), torch.float32)}
    loaded.set_progress_bar_config(disable=True)
    drawn = loaded("1girl, love live!", num_inference_steps=1, width=64, height=64, output_type="np").images
    assert drawn.shape == (1, 64, 64, 3)


def test_the_single_file_loads_with_the_folder_as_its_configuration(exported):
    from diffusers import StableDiffusionXLPipeline

    loaded = StableDiffusionXLPipeline.from_single_file(
        str(exported / "model.safetensors"), config=str(exported / "diffusers"), local_files_only=True
    )
    again = StableDiffusionXLPipeline.from_pretrained(exported / "diffusers", local_files_only=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        theirs, ours = (getattr(pipeline, name).float().state_dict() for pipeline in (loaded, again))
        theirs = {
            path.removeprefix("text_model."): value for path, value in theirs.items() if "position_ids" not in path
        }
        ours = {path.removeprefix("text_model."): value for path, value in ours.items()}
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(value, theirs[path]) for path, value in ours.items())


def random_ascii(seed, count):
    generator = random.Random(seed)
    printable = [chr(code) for code in range(32, 127)]
    return ["".join(generator.choices(printable, k=generator.randrange(90))) for _ in range(count)]


@pytest.fixture(scope="module")
def exported_tokenizers(tmp_path_factory):
    """The training's tokenizer, from a part of CLIP's files, and the two that are exported: (loaded, padding's id)."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    table = json.loads(Path("tests/sdxl/clip_token_ids.json").read_text())  # transformers 4.36 and ftfy on CLIP's files
    (folder / "vocab.json").write_text(json.dumps(table["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *table["merges"]]) + "\n")
    files = folder / "vocab.json", folder / "merges.txt"
    training = ClipTokenizer(*files)
    loaded = []
    for name, pad in (("tokenizer", training.eos_token_id), ("tokenizer_2", 0)):
        (folder / name).mkdir()
        for file, text in export_diffusers._tokenizer(files, export_diffusers.PADS[name]).items():
            (folder / name / file).write_bytes(text)
        loaded.append((CLIPTokenizer.from_pretrained(folder / name), pad))
    return training, loaded


def ids_of_the_training(training, texts, pad):
    bodies = [training.encode(text)[:75] for text in texts]
    return [[training.bos_token_id, *body, training.eos_token_id] + [pad] * (75 - len(body)) for body in bodies]


def ids_of(tokenizer, texts):
    return tokenizer(texts, padding="max_length", max_length=77, truncation=True)["input_ids"]


def test_exported_tokenizers_give_the_ids_of_the_training_padding_included(exported_tokenizers, tmp_path):
    from transformers import CLIPTokenizer

    training, loaded = exported_tokenizers
    texts = [text for text in random_ascii(1, 2000) if "&" not in text and "<|" not in text]  # ftfy reads &amp; as &
    texts += PROMPTS["emoticons"] + ["love live!", "!", "! !", "!!", "!?", "girls und panzer!!!", "x!x"]
    for exported, pad in loaded:
        exported.save_pretrained(tmp_path / str(pad))
        for tokenizer in (exported, CLIPTokenizer.from_pretrained(tmp_path / str(pad))):
            assert ids_of(tokenizer, texts) == ids_of_the_training(training, texts, pad)


def test_a_prompt_cleaned_with_ftfy_has_the_ids_of_the_training_in_transformers_5(exported_tokenizers):
    """But for a capital sigma that ends a word, and for a prompt that spells a special token."""
    training, loaded = exported_tokenizers
    texts = random_ascii(2, 16_000) + sum(PROMPTS.values(), [])
    cleaned = [ftfy.fix_text(text) for text in texts]
    exceptions = re.compile(r"\w\u03a3\b|<\|(start|end)of", re.IGNORECASE)
    excepted = {place for place, text in enumerate(cleaned) if exceptions.search(text)}
    assert len(texts) == 16_700 and len(excepted) < 60
    for exported, pad in loaded:
        pairs = zip(ids_of(exported, cleaned), ids_of_the_training(training, texts, pad), strict=True)
        assert {place for place, (found, right) in enumerate(pairs) if found != right} <= excepted


def test_transformers_5_cleans_nothing_by_itself(exported_tokenizers):
    """If this fails, the model card and docs/tensor-names.md ask for ftfy without need."""
    training, loaded = exported_tokenizers
    texts = sum(PROMPTS.values(), [])
    for exported, pad in loaded:
        pairs = zip(ids_of(exported, texts), ids_of_the_training(training, texts, pad), strict=True)
        assert sum(found != right for found, right in pairs) > 250


def test_folder_is_the_same_bytes_again(exported, tokenizer, tmp_path):
    export_diffusers.export(
        exported / "model.safetensors",
        {"tokenizer": tokenizer, "tokenizer_2": tokenizer},
        tiny_sdxl.MODEL,
        tmp_path / "again",
    )

    def digests(folder):
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*")
            if path.is_file()
        }

    assert digests(tmp_path / "again") == digests(exported / "diffusers")
    assert len(digests(tmp_path / "again")) == 18


def test_a_checkpoint_that_is_not_whole_leaves_nothing(exported, tokenizer, tmp_path):
    tensors = load_file(exported / "model.safetensors")
    del tensors["first_stage_model.decoder.conv_out.bias"]
    tensors["model.diffusion_model.out.2.weight"] = torch.zeros(4, 24, 1, 1).half()
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="missing: first_stage_model.decoder.conv_out.bias") as refusal:
        export_diffusers.export(
            tmp_path / "bad.safetensors",
            {"tokenizer": tokenizer, "tokenizer_2": tokenizer},
            tiny_sdxl.MODEL,
            tmp_path / "out",
        )
    assert "other shape: model.diffusion_model.out.2.weight" in refusal.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_a_checkpoint_with_nan_is_refused_by_the_tensors_name(exported, tokenizer, tmp_path):
    tensors = load_file(exported / "model.safetensors")
    tensors["first_stage_model.decoder.conv_out.bias"][1] = torch.nan
    save_file(tensors, tmp_path / "bad.safetensors")
    both = {"tokenizer": tokenizer, "tokenizer_2": tokenizer}
    with pytest.raises(UserError, match="first_stage_model.decoder.conv_out.bias holds NaN or infinity"):
        export_diffusers.export(tmp_path / "bad.safetensors", both, tiny_sdxl.MODEL, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_a_tokenizer_of_another_model_is_refused(exported, tokenizer, tmp_path):
    words = json.loads(tokenizer[0].read_text()) | {"one more": 1000}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match="has 1001 tokens"):
        export_diffusers.export(
            exported / "model.safetensors",
            {"tokenizer": (tmp_path / "vocab.json", tokenizer[1]), "tokenizer_2": tokenizer},
            tiny_sdxl.MODEL,
            tmp_path / "out",
        )
    with pytest.raises(UserError, match="nowhere.json does not exist"):
        export_diffusers.export(
            exported / "model.safetensors",
            {"tokenizer": (tmp_path / "nowhere.json", tokenizer[1]), "tokenizer_2": tokenizer},
            tiny_sdxl.MODEL,
            tmp_path / "out",
        )


def test_merge_and_bake_never_load_torch():
    code = "import sys; sys.path.insert(0, 'src'); from kohaku_delta.weights import bake, merge; "
    code += "print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
        == "False\n"
    )
