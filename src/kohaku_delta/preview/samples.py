"""The preview's pictures one by one, each with the text from which a WebUI takes its settings.

The text is that of AUTOMATIC1111's WebUI, in the PNG text `parameters`: prompt, negative prompt, then steps, sampler,
guidance, seed, size, and the first ten digits of the checkpoint's sha256. Brackets and backslashes of a prompt are
escaped, because a WebUI reads bare ones as emphasis and the pictures were drawn without any. A program that starts from
other noise draws another picture with the same settings.
"""

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from kohaku_delta import atomic_files
from kohaku_delta.params import Preview

TEXT = "parameters"
EMPHASIS = re.compile(r"[\\()\[\]]")


def sample_name(model: str, index: int) -> str:
    """The file of the picture that `model` (base | final) drew for the prompt `index`."""
    return f"{model}-{index:02d}.png"


def is_sample(name: str) -> bool:
    """Whether a file has the name of such a picture."""
    return re.fullmatch(r"(base|final)-\d{2,}\.png", name) is not None


def parameters_text(preview: Preview, index: int, checkpoint: str, sha256: str) -> str:
    """The text of one picture. checkpoint: its file's name without the suffix."""
    settings = {
        "Steps": preview.steps,
        "Sampler": "DDIM",
        "CFG scale": f"{preview.guidance:g}",
        "Seed": preview.seed,
        "Size": f"{preview.width}x{preview.height}",
        "Model hash": sha256[:10],
        "Model": json.dumps(checkpoint, ensure_ascii=False) if re.search("[,:\n]", checkpoint) else checkpoint,
    }
    negative = [f"Negative prompt: {_escape(preview.negative)}"] if preview.negative else []
    last = ", ".join(f"{name}: {value}" for name, value in settings.items())
    return "\n".join([_escape(preview.prompts[index]), *negative, last])


def _escape(prompt: str) -> str:
    return EMPHASIS.sub(r"\\\g<0>", prompt)


def write_samples(
    folder: Path, preview: Preview, pictures: Mapping[str, list[np.ndarray]], checkpoints: Mapping[str, tuple[str, str]]
) -> None:
    """Replace `folder` by one PNG per model and prompt. pictures: model → one per prompt, uint8 RGB (H, W, 3);
    checkpoints: model → (file name without suffix, sha256).
    """
    with atomic_files.atomic_dir(folder, is_sample) as aside:
        for model, (checkpoint, sha256) in checkpoints.items():
            for index, picture in enumerate(pictures[model]):
                text = PngImagePlugin.PngInfo()
                text.add_text(TEXT, parameters_text(preview, index, checkpoint, sha256))
                file = io.BytesIO()
                Image.fromarray(picture).save(file, "PNG", pnginfo=text)
                (aside / sample_name(model, index)).write_bytes(file.getvalue())
