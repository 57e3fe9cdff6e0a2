"""What a training reads, and everything that its outputs depend on. Imports no torch itself.

`files` holds a path per option of the train stage; None for one that is not given, whose file inputs.json names.
"""

from pathlib import Path

from kohaku_delta import numerics
from kohaku_delta.danbooru import tars as tar_files
from kohaku_delta.formats import safetensors_io
from kohaku_delta.formats.hashing import hash_file
from kohaku_delta.hub import inputs_manifest
from kohaku_delta.params import NETWORK_WEIGHTS, Recipe
from kohaku_delta.provenance import environment, import_closure
from kohaku_delta.sdxl.tokenizer import ClipTokenizer
from kohaku_delta.weights import lokr_format

Tokenizers = tuple[ClipTokenizer, ClipTokenizer]


def result_parameters(recipe: Recipe) -> dict:
    """The parameters that decide the weights and the journal: {section.key: value}, with values as YAML has them."""
    sections = {
        "schedule": recipe.schedule.model_dump(),
        "lokr": recipe.lokr.model_dump(),
        "model": recipe.model.model_dump(),
        "train": recipe.train.model_dump(exclude={"milestone_every"}),
        "caption": {"separator": recipe.caption.separator},
    }
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def code_dependencies(lock: str) -> dict[str, str]:
    """Digests of the training's code and libraries, as the stage `code` writes them; by name. lock: cpu | cuda."""
    root = Path(__file__).resolve().parents[3]
    code = import_closure.describe_stage(root / "stages" / "train.py", root / "requirements" / f"{lock}.txt")
    versions = environment.libraries(code.libraries)
    return {f"code of {name}": digest for name, digest in code.files.items()} | {
        f"library {name}": f"{versions[name]} {library.hashes}" for name, library in code.libraries.items()
    }


def run_dependencies(
    recipe: Recipe, files: dict[str, Path], tokenizer_files: list[Path], tars: list[Path]
) -> dict[str, str]:
    """Everything that decides the outputs, by name: files, code, parameters, numerics, libraries.

    Of tars given by hand (--tars), their names and sizes. tokenizer_files: as load_tokenizers returns them.
    """
    start = network_weights(files)
    return {
        **{name: hash_file(files[name]) for name in ("base", "posts", "captions", "schedule")},
        **code_dependencies(recipe.requirements),
        **{name: str(value) for name, value in result_parameters(recipe).items()},
        "train.milestone_every": str(recipe.train.milestone_every),
        "tokenizers": str([hash_file(path) for path in tokenizer_files]),
        "tars": str(
            [(path.name, path.stat().st_size) for path in tars]
            if files["tars"]
            else inputs_manifest.sha256s(files["inputs"], "tars")
        ),
        **{f"numerics {name}": value for name, value in numerics.describe(recipe.train.device).items()},
        **({NETWORK_WEIGHTS: hash_file(start)} if start else {}),
    }


def load_tokenizers(files: dict[str, Path]) -> tuple[list[Path], Tokenizers]:
    """The four files of both tokenizers, and the tokenizers."""
    first, second = (
        inputs_manifest.tokenizer(files["inputs"], name, files[name]) for name in ("tokenizer", "tokenizer_2")
    )
    return [*first, *second], (ClipTokenizer(*first), ClipTokenizer(*second))


def tar_paths(files: dict[str, Path]) -> dict[int, Path]:
    """The tars by number, from the folder given by hand (--tars) or from the verified inputs."""
    if files["tars"]:
        return tar_files.tars_in(files["tars"])
    return tar_files.tars_by_number(inputs_manifest.paths(files["inputs"], "tars"))


def network_weights(files: dict[str, Path]) -> Path | None:
    """The LoKr file that the training starts from (--network-weights, or of the inputs); None: from scratch."""
    by_hand = files.get("network_weights")
    if by_hand or not files["inputs"].is_file():
        return by_hand
    return inputs_manifest.optional_path(files["inputs"], NETWORK_WEIGHTS)


def describe_start(start: Path, base: Path) -> str:
    """What is said of a LoKr that the training begins with."""
    with safetensors_io.open_file(start) as file:
        known = lokr_format.base_digest(file)
    unknown = f" It does not say on which base it was trained: it is taken for that of {base}."
    return f"the LoKr starts from {start}, with a new optimizer state and warm-up.{'' if known else unknown}"
