import hashlib
import io
import re

import numpy as np
import pytest
from PIL import Image

from kohaku_delta.params import Preview
from kohaku_delta.preview import image_grid, samples

PREVIEW = Preview(
    seed=7, steps=24, guidance=5.5, width=24, height=16, columns=2, held_out=0, negative="bad (thing), worst quality",
    prompts=["1girl, ganyu (genshin impact), \\\\m/, [x], ★", "circle", "star"],
)  # fmt: skip
PAIR = re.compile(r"\s*(\w[\w \-/]+):\s*([^,]*)(?:,|$)")


def pictures(seed: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (3, 16, 24, 3), np.uint8))


@pytest.fixture
def folder(tmp_path):
    drawn = {"base": pictures(1), "final": pictures(2), "drawing": pictures(3)}
    checkpoints = {"base": ("delta-base", "a" * 64), "final": ("final, rev1", hashlib.sha256(b"model").hexdigest())}
    samples.write_samples(tmp_path / "samples", PREVIEW, drawn, checkpoints)
    return tmp_path / "samples"


def test_a_sample_is_one_picture_of_the_grid_and_carries_its_settings_as_a_webui_reads_them(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{model}-{index:02d}.png" for model in ("base", "final") for index in range(3)
    ]
    image = Image.open(folder / "final-00.png")
    assert (np.asarray(image) == pictures(2)[0]).all()
    prompt, negative, settings = image.info["parameters"].split("\n")
    # a bare bracket is emphasis in a WebUI; behind a backslash it is a bracket
    assert re.sub(r"\\(.)", r"\1", prompt) == PREVIEW.prompts[0] and not re.search(r"(?<!\\)[(\[]", prompt)
    assert negative == r"Negative prompt: bad \(thing\), worst quality"
    assert dict(PAIR.findall(settings.split(", Model: ")[0])) == {
        "Steps": "24", "Sampler": "DDIM", "CFG scale": "5.5", "Seed": "7", "Size": "24x16",
        "Model hash": hashlib.sha256(b"model").hexdigest()[:10],
    }  # fmt: skip
    assert settings.endswith(', Model: "final, rev1"')
    assert Image.open(folder / "base-02.png").info["parameters"].endswith("Model hash: aaaaaaaaaa, Model: delta-base")


def test_the_boxes_of_the_grid_are_where_the_pictures_are(folder):
    drawn = {"base": pictures(1), "final": pictures(2)}
    sheet = np.asarray(Image.open(io.BytesIO(image_grid.draw_grid(PREVIEW.prompts, drawn, {}, 2, "title"))))
    grid = image_grid.Grid.of(PREVIEW.prompts, 2, (24, 16), 2)
    assert sheet.shape[1::-1] == grid.size and grid.scale == 8
    for number, shown in enumerate(drawn.values()):
        for index, picture in enumerate(shown):
            left, top, right, bottom = grid.box(index, number)
            assert (sheet[top:bottom, left:right] == picture.repeat(8, 0).repeat(8, 1)).all()
