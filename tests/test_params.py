"""A recipe is read whole or refused by a sentence that names the key and what was expected."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from kohaku_delta import yaml_file
from kohaku_delta.errors import UserError
from kohaku_delta.params import load

yaml = YAML(typ="safe", pure=True)


def changed(tmp_path, change):
    content = yaml.load(Path("params.yaml"))
    change(content)
    path = tmp_path / "params.yaml"
    with open(path, "w") as file:
        yaml.dump(content, file)
    return path


PILOT = {  # what the pilot changes in the release
    "root", "supplied", "download.mirror", "download.inputs.index.0.url", "download.inputs.tars.0.url", "merge.start",
    "schedule.max_steps", "train.milestone_every", "execution.ranks", "execution.save_every", "bake.title", "published",
}  # fmt: skip


def differences(ours, theirs, path="") -> set[str]:
    """The dotted keys whose values differ."""
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        ours, theirs = dict(enumerate(ours)), dict(enumerate(theirs))
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return {path} if ours != theirs else set()
    keys = ours.keys() | theirs.keys()
    return {each for key in keys for each in differences(ours.get(key), theirs.get(key), f"{path}.{key}".lstrip("."))}


def test_the_pilot_is_the_release_but_for_what_is_named_and_marked():
    pilot, release = (yaml.load(Path(path)) for path in ("pilot/params.yaml", "params.yaml"))
    assert differences(pilot, release) == PILOT
    assert Path("pilot/params.yaml").read_text().count("# pilot: ") == len(PILOT)


EPSILON = {  # what Epsilon's recipe changes in Delta's
    "root", "supplied", "download.mirror", "download.inputs.database.url", "download.inputs.database.bytes",
    "download.inputs.database.sha256", "download.inputs.delta_base.url", "download.inputs.delta_base.bytes",
    "download.inputs.delta_base.sha256", "download.inputs.sdxl", "download.inputs.beta", "download.inputs.gamma",
    "selection.replacement", "selection.ranges.1.from", "selection.ranges.1.draw", "selection.ranges.2.below",
    "caption.dropped_artists",
    *(f"caption.quality_above.{rating}.{place}" for rating in range(4) for place in range(5)),
    "caption.no_quality_above_id", "merge.start", "schedule.micro_batches", "train.tag_dropout", "train.noise_offset",
    "train.learning_rate_unet", "train.learning_rate_text", "train.warmup_steps", "train.timestep_freq_shift",
    "train.milestone_every", "execution.ranks", "bake.title", "bake.description", "bake.date",
    *(f"release.{name}" for name in ("final", "base", "lokr", "artists", "characters")),
}  # fmt: skip
MARKS = ("page", "tool", "inferred", "not known", "ours", "Delta's", "this recipe's place")


def test_epsilons_recipe_is_deltas_but_for_what_is_named_and_says_where_each_value_comes_from():
    text = Path("recipes/epsilon-rev1/params.yaml").read_text()
    epsilon, release = yaml.load(text), yaml.load(Path("params.yaml"))
    found = {key for key in differences(epsilon, release) if not key.startswith("published.")}
    assert found == EPSILON
    lines = text.splitlines()
    for key in {".".join(key.split(".")[:2]) for key in found if not key.startswith("download.inputs.")}:
        section, _, name = key.rpartition(".")
        start = next(place for place, each in enumerate(lines) if each.startswith(f"{section}:")) if section else 0
        line = next(each for each in lines[start:] if each.strip().startswith(f"{name}:"))
        assert any(mark in line for mark in MARKS), line
    assert text.count("# not known") >= 8


def test_epsilon_trains_with_the_numbers_of_its_authors_page():
    recipe = load("recipes/epsilon-rev1/params.yaml")
    train, schedule, caption = recipe.train, recipe.schedule, recipe.caption
    ranges = {(part.from_, part.below): part.draw for part in recipe.selection.ranges}
    assert ranges == {(0, 2_000_000): 1_000_000, (2_000_000, 5_000_000): 2_000_000, (5_000_000, None): "all"}
    assert schedule.batch_size * schedule.micro_batches == 256 and schedule.epochs == 1
    assert schedule.micro_batches == 16 * recipe.execution.ranks and schedule.batch_size == 4
    assert (train.optimizer, train.betas, train.weight_decay) == ("Lion8bit", [0.9, 0.95], 0.1)
    assert (train.learning_rate_unet, train.learning_rate_text) == (2e-5, 5e-6)
    assert train.warmup_steps * recipe.execution.ranks == 1000
    assert (train.tag_dropout, train.noise_offset, train.min_snr_gamma) == (0.15, 0.0357, 5.0)
    assert (schedule.area, schedule.min_side, schedule.max_side) == (1024**2, 256, 4096)
    assert train.precision == "float16" and train.shuffle_caption
    factors = {*recipe.lokr.preset.modules.values(), *recipe.lokr.preset.names.values()}
    assert recipe.lokr.preset == load("params.yaml").lokr.preset and (min(factors), max(factors)) == (2, 8)
    assert all(len(thresholds) == 6 for thresholds in caption.quality_above.values())
    assert recipe.merge.start == "published"
    release = load("params.yaml").published.final
    base = recipe.download.inputs["delta_base"]
    assert (base.bytes, base.sha256) == (release.bytes, release.sha256), "it starts from Delta's final model"
    assert (recipe.published.dataset.posts, recipe.published.dataset.steps) == (5_210_319, 20_354)
    assert list(recipe.published.milestones) == [13_600] and 13_600 % train.milestone_every == 0


@pytest.mark.parametrize(
    "recipe", ["params.yaml", "miniature/params.yaml", "pilot/params.yaml", "recipes/epsilon-rev1/params.yaml"]
)
def test_every_recipe_is_valid_and_has_the_same_keys(recipe):
    def keys(content, path=""):
        if isinstance(content, dict) and not path.endswith((".inputs", ".preset.modules", ".published")):
            return {each for key, value in content.items() for each in keys(value, f"{path}.{key}")}
        return {path}

    load(recipe)
    assert keys(yaml.load(Path(recipe))) == keys(yaml.load(Path("params.yaml")))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda c: c["train"].update(learning_rat=1.0), "the key train.learning_rat is not known"),
        (
            lambda c: c["execution"].update(save_every="often"),
            "execution.save_every is 'often'; it must be a whole number",
        ),
        (lambda c: c["train"].update(tag_dropout=True), "train.tag_dropout is True; it must be a number"),
        (lambda c: c["train"].update(device="tpu"), "train.device is 'tpu'; it must be 'cpu' or 'cuda'"),
        (lambda c: c["schedule"].update(lanes=6), "power of two"),
        (lambda c: c["schedule"].update(lanes=64), "not a multiple of lanes"),
        (
            lambda c: c["lokr"]["preset"]["modules"].update(CrossAttention="4"),
            "lokr.preset.modules.CrossAttention is '4'; it must be a whole number",
        ),
        (lambda c: c["lokr"].update(alpha=65520), "lokr.alpha is 65520"),
        (
            lambda c: c["selection"]["ranges"][1].update(draw="some"),
            "selection.ranges.1.draw is 'some'; it must be a whole number or 'all'",
        ),
        (lambda c: c["download"]["inputs"]["sdxl"].update(sha256="31E3"), "download.inputs.sdxl.sha256"),
        (
            lambda c: c["download"]["inputs"]["gamma"].update(sha256=3.8942904e16),
            "download.inputs.gamma.sha256 is 3.8942904e+16; it must be a text",
        ),
        (lambda c: c.pop("selection"), "the key selection is missing"),
        (lambda c: c["schedule"].update(side_step=12), "schedule.side_step is 12; it must be a multiple of 8"),
        (lambda c: c["schedule"].update(min_side=260), "schedule.min_side is 260; it must be a multiple of 8"),
        (lambda c: c["schedule"].update(max_side=4090), "schedule.max_side is 4090; it must be a multiple of 8"),
        (lambda c: c["schedule"].update(area=4000), "schedule: area 4000 gives a square bucket of side 0"),
        (
            lambda c: c["schedule"].update(max_side=512),
            "square bucket of side 1024 (in steps of side_step, 64); "
            "it must lie between min_side (256) and max_side (512)",
        ),
        (lambda c: c["preview"].update(width=1020), "preview.width is 1020; it must be a multiple of 8"),
        (lambda c: c["preview"].update(height=1001), "preview.height is 1001; it must be a multiple of 8"),
        (lambda c: c["preview"].update(steps=1001), "preview.steps is 1001; it must be less than or equal to 1000"),
        (
            lambda c: c["selection"].update(ranges=[]),
            "selection.ranges is []; it must be a list with at least 1 entries",
        ),
        (
            lambda c: c["selection"]["ranges"][1].update(below=3000000),
            "selection.ranges.1: from is 3000000 and below is 3000000, so no id lies between",
        ),
        (lambda c: c["selection"].update(seed=-1), "selection.seed is -1; it must be greater than or equal to 0"),
        (lambda c: c["lokr"].update(seed=-1), "lokr.seed is -1; it must be greater than or equal to 0"),
        (lambda c: c["train"].update(seed=1 << 53), f"train.seed is {1 << 53}; it must be less than {1 << 53}"),
        (lambda c: c["train"].update(precision="bfloat16"), "train: weights is float16 and precision is bfloat16"),
        (lambda c: c["train"].update(precision="float32"), "train: weights is float16 and precision is float32"),
        (lambda c: c["caption"].update(separator=" | , "), "caption.separator: ' | , ' has a comma, or is a space"),
        (lambda c: c["caption"].update(separator="  "), "caption.separator: '  ' has a comma, or is a space"),
        (lambda c: c.pop("supplied"), "the key supplied is missing"),
        (lambda c: c.update(caption=3), "caption is 3; it must be a mapping"),
        (lambda c: c.update(requirements="gpu"), "requirements is 'gpu'; it must be 'cpu' or 'cuda'"),
        (lambda c: c["caption"].update(years={2010: "old"}), 'caption.years: the key 2010 needs quotes ("2010")'),
        (
            lambda c: c["caption"]["ratings"].update(safe=["safe"]),
            'caption.ratings: the key "safe" must be a whole number, in quotes',
        ),
        (lambda c: c["caption"].update(quality_above=3), "caption.quality_above is 3; it must be a mapping"),
        (
            lambda c: c["caption"].update(quality_above={"percentiles": [90, 75]}),
            "caption: quality_above.percentiles needs 6 falling percentiles",
        ),
        (
            lambda c: c["caption"].update(quality_above={"percentiles": [90, 75, 60, 60, 30, 10]}),
            "caption: quality_above.percentiles needs 6 falling percentiles",
        ),
        (
            lambda c: c["caption"].update(quality_above={"percentiles": [100, 75, 60, 45, 30, 10]}),
            "caption.quality_above.percentiles.0 is 100; it must be less than 100",
        ),
        (
            lambda c: c["caption"].update(quality_above={"percentiles": [90, 75, 60, 45, 30, 10], "0": [1]}),
            "the key caption.quality_above.0 is not known",
        ),
    ],
)
def test_a_wrong_key_is_named_with_its_path(tmp_path, change, sentence):
    with pytest.raises(UserError) as refusal:
        load(changed(tmp_path, change))
    assert sentence in refusal.value.message


@pytest.mark.parametrize("content", ["a: [", "just text", "", "\xff"])
def test_what_is_no_recipe_is_refused(tmp_path, content):
    path = tmp_path / "params.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="params.yaml"):
        load(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    {
        "Windows-1252": (b"root: .\ntitle: caf\xe9\n", "line 2 has the byte 0xe9, which is not UTF-8"),
        "UTF-16": ("root: .\n".encode("utf-16"), "line 1 has the byte 0xff"),
        "twice": (b"root: .\na: 1\nroot: ..\n", 'line 3, column 1: found duplicate key "root"'),
        "a tab": (b"a:\n\tb: 1\n", "line 2, column 1: found character '\\t'"),
        "5,000 digits": (b"root: .\nseed: " + b"9" * 5000, "line 2: 9999"),
        "deep": (b"a: " + b"[" * 5000, "nested too deeply"),
        "half a character": (b'a:\n  b: "\\ud800"\n', "a.b holds half of a surrogate pair"),
        "an overflow": (b"train:\n  clip: 1e999\n", "train.clip is inf, and every number must be finite"),
        "not a number": (b"clip: .nan\n", "clip is nan"),
        "a date": (b"a:\n  b: 2024-01-01\n", "a.b is of YAML's type date, which DVC does not write: put it in quotes"),
        "a number as a key": (b"1: a\n", 'read: the key 1 needs quotes ("1")'),
    }.values(),
)
def test_a_fault_of_yaml_is_named_with_its_line_or_key(tmp_path, content, sentence):
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(UserError) as refusal:
        load(tmp_path / "params.yaml")
    message = refusal.value.message
    assert sentence in message and "params.yaml" in message
    assert not any(word in message for word in ("unicode string", "suppress", "set_int_max_str_digits", "https:"))


def test_a_strangers_recipe_cannot_fill_the_memory_or_control_the_terminal(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n")
    with pytest.raises(UserError, match="aliases"):
        load(path)
    path.write_bytes(b"#" * (yaml_file.MAX_BYTES + 1))
    with pytest.raises(UserError, match="more than 524,288 bytes"):
        load(path)
    path.write_text('"\\e[2J\\n": 1\n' + f"root: [{'x' * 100_000}]\n")
    with pytest.raises(UserError) as refusal:
        load(path)
    lines = refusal.value.message.splitlines()
    assert len(lines) == 5 and all(line.isprintable() and len(line) < 1000 for line in lines)


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "params.yaml")


def test_the_release_trains_with_the_numbers_of_its_model_card():
    recipe = load("params.yaml")
    train, schedule = recipe.train, recipe.schedule
    assert (train.optimizer, train.betas, train.weight_decay) == ("Lion8bit", [0.9, 0.95], 0.1)
    assert (train.learning_rate_unet, train.learning_rate_text, train.clip_norm) == (4e-5, 1e-5, 1.0)
    assert (train.precision, train.weights, train.warmup_steps, train.last_step_divisor) == (
        "float16",
        "float16",
        50,
        "full",
    )
    assert schedule.batch_size * schedule.micro_batches == 128 and (
        schedule.batch_size,
        schedule.micro_batches,
        schedule.epochs,
    ) == (4, 16 * 2, 1)
    assert (schedule.area, schedule.min_side, schedule.max_side, schedule.side_step) == (1024**2, 256, 4096, 64)
    assert (train.shuffle_caption, train.tag_dropout, train.max_token_length, train.crop_conditioning) == (
        True,
        0.1,
        225,
        "letterbox",
    )
    assert (train.noise_offset, train.min_snr_gamma, recipe.model.vae_scaling_factor) == (0.05, 5.0, 0.13025)
    assert (
        train.seed == schedule.seed == recipe.lokr.seed == 1337
        and recipe.train.milestone_every == 2000
        and train.gradient_checkpointing
    )
