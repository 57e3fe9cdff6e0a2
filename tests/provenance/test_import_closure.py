"""What makes a stage run again: a changed number, template or library does; a comment, a docstring, formatting or a new
pytest does not.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kohaku_delta.errors import UserError
from kohaku_delta.provenance import import_closure

ROOT = Path(__file__).resolve().parents[2]
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("*.py") if path.stem != "code")


@pytest.fixture
def copy(tmp_path):
    """The code of the repository, elsewhere."""
    for name in ("src", "stages", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return tmp_path


def described(root: Path, lock: str = "cpu") -> dict[str, str]:
    """stage → what lies in build/code, computed without what was read before."""
    for each in (import_closure._references, import_closure.locked_libraries):
        each.cache_clear()
    return {
        stage: import_closure.dumps(
            import_closure.describe_stage(root / "stages" / f"{stage}.py", root / "requirements" / f"{lock}.txt")
        )
        for stage in STAGES
    }


def changed(root: Path, change) -> set[str]:
    """The stages whose description a change moves."""
    before = described(root)
    change()
    after = described(root)
    return {stage for stage in STAGES if before[stage] != after[stage]}


def replace(path: Path, old: str, new: str):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.ci
def test_it_is_the_same_elsewhere(copy):
    assert described(copy) == described(ROOT)


def test_comments_docstrings_and_formatting_change_no_stage(copy):
    optimizer = copy / "src" / "kohaku_delta" / "training" / "optimizer.py"

    def change():
        text = optimizer.read_text()
        optimizer.write_text(
            "# A comment.\n"
            + text.replace('"""Constant after', '"""Otherwise said: constant after').replace(
                "(step: int, base", "(\n    step: int,\n    base"
            )
        )

    assert changed(copy, change) == set()


@pytest.mark.ci
def test_a_formatting_run_of_every_file_changes_no_stage(copy):
    def change():
        for path in copy.rglob("*.py"):
            path.write_text(ast.unparse(ast.parse(path.read_text())))

    assert changed(copy, change) == set()


@pytest.mark.slow
def test_a_number_in_the_optimizer_changes_the_stages_that_train_with_it(copy):
    optimizer = copy / "src" / "kohaku_delta" / "training" / "optimizer.py"
    assert changed(copy, lambda: replace(optimizer, "0.5, 2000", "0.5, 2001")) == {"train", "preview", "milestones"} & {
        stage
        for stage in STAGES
        if "src/kohaku_delta/training/optimizer.py" in json.loads(described(ROOT)[stage])["files"]
    }


@pytest.mark.ci
def test_a_new_pytest_changes_no_stage_and_a_new_torch_those_that_compute_with_it(copy):
    lock = copy / "requirements" / "cpu.txt"
    assert changed(copy, lambda: replace(lock, "pytest==", "pytest==1")) == set()
    using = changed(copy, lambda: replace(lock, "torch==2.13.0+cpu", "torch==2.13.1+cpu"))
    assert {"train", "export", "preview", "milestones"} <= using and not {
        "select",
        "filter",
        "caption",
        "schedule",
        "merge",
    } & using


@pytest.mark.ci
def test_a_hash_of_a_library_counts(copy):
    """The same version from another archive."""
    lock = copy / "requirements" / "cpu.txt"
    text = lock.read_text()
    sha256 = re.search(r"(?m)^numpy==.*?sha256:(\w{64})", text, re.DOTALL)[1]
    assert "train" in changed(copy, lambda: lock.write_text(text.replace(sha256, "0" * 64)))


@pytest.mark.ci
def test_a_file_that_is_no_python_counts_by_its_bytes(copy):
    module, template = (
        copy / "src" / "kohaku_delta" / "dataset" / "tag_counts.py",
        copy / "src" / "kohaku_delta" / "dataset" / "words.txt",
    )
    template.write_text("one")
    replace(module, "\nimport", "\nTEMPLATE = 'words.txt'\nimport")
    using = changed(copy, lambda: template.write_text("two"))
    assert "caption" in using and "merge" not in using
    template.with_name("other.txt").write_text("named by nobody")
    assert changed(copy, lambda: template.with_name("other.txt").write_text("changed")) == set()


def test_requirements_of_requirements_are_reached():
    """filelock is imported by torch alone."""
    description = import_closure.describe_stage(ROOT / "stages" / "train.py", ROOT / "requirements" / "cpu.txt")
    assert {"torch", "sympy", "mpmath", "ftfy", "wcwidth"} <= description.libraries.keys()
    assert not {"pytest", "dvc", "hypothesis", "uv"} & description.libraries.keys()


def test_a_digest_is_that_of_the_tree_without_docstrings():
    """Against a reading of its own: what is left when every docstring is a `pass`."""
    one, other = b'"""Doc."""\ndef f(a):\n    """Doc."""\n    return a + 1  # comment\n', b"def f(a): return (a+1)\n"
    assert import_closure.file_digest("x.py", one) == import_closure.file_digest("x.py", other)
    for differing in (
        b"def f(a): return a + 2\n",
        b"def f(b): return b + 1\n",
        b'def f(a):\n    "x"; "y"\n    return a + 1\n',
    ):
        assert import_closure.file_digest("x.py", differing) != import_closure.file_digest("x.py", one)
    assert import_closure.file_digest("x.html", one) != import_closure.file_digest("x.html", other)
    with pytest.raises(UserError, match="x.py is not Python"):
        import_closure.file_digest("x.py", b"def f(:")


def test_every_file_that_a_stage_loads_is_described(tmp_path):
    """The modules that are loaded by running every import of a stage's files are among them."""
    for stage in ("caption", "train"):
        description = import_closure.describe_stage(
            ROOT / "stages" / f"{stage}.py", ROOT / "requirements" / "cpu.txt"
        ).files
        modules = sorted(
            name.removeprefix("src/").removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
            for name in description
            if name.startswith("src/")
        )
        code = (
            f"import sys, importlib; sys.path.insert(0, {str(ROOT / 'src')!r}); "
            f"[importlib.import_module(each) for each in {modules!r}]; "
            "ours = [module for name, module in sys.modules.items() if name.split('.')[0] == 'kohaku_delta']; "
            "print('\\n'.join(module.__file__ for module in ours))"
        )
        loaded = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
        ).stdout.split()
        assert {Path(each).relative_to(ROOT).as_posix() for each in loaded} <= description.keys()


@pytest.mark.ci
def test_the_stage_writes_a_file_per_stage_and_is_refused_what_the_lock_lacks(tmp_path, copy):
    import runpy

    main = runpy.run_path(str(ROOT / "stages" / "code.py"))["main"]
    done = CliRunner().invoke(
        main, ["--params", str(ROOT / "miniature" / "params.yaml"), "--out", str(tmp_path / "code")]
    )
    assert done.exit_code == 0 and f"{len(STAGES)} stages" in done.output, done.output
    assert {path.stem: path.read_text() for path in (tmp_path / "code").iterdir()} == described(ROOT)
    lock = copy / "requirements" / "cpu.txt"
    text = lock.read_text()
    lock.write_text(
        text[: text.index("click==")]
        + text[
            text.index("\ncolorama==")
            if "\ncolorama==" in text
            else text.index("\n", text.rindex("--hash", 0, text.index("\n", text.index("click==") + 400))) :
        ]
    )
    for broken, named in (("click==8.5.1\n", "not pinned by version and hash"), ("", "is imported and")):
        lock.write_text(broken)
        import_closure.locked_libraries.cache_clear()
        done = CliRunner().invoke(
            main,
            ["--params", str(ROOT / "miniature" / "params.yaml"), "--lock", str(lock), "--out", str(tmp_path / "none")],
        )
        assert done.exit_code == 1 and named in done.output and "Traceback" not in done.output
    import_closure.locked_libraries.cache_clear()


def test_a_stage_is_refused_with_code_that_was_changed_since_it_was_described(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert import_closure.verified_code(ROOT / "stages" / "caption.py") is None
    description = import_closure.describe_stage(ROOT / "stages" / "caption.py", ROOT / "requirements" / "cpu.txt")
    path = tmp_path / "build" / "code" / "caption.json"
    path.parent.mkdir(parents=True)
    path.write_text(import_closure.dumps(description))
    assert import_closure.verified_code(ROOT / "stages" / "caption.py") == description
    path.write_text(
        import_closure.dumps(
            description.model_copy(
                update={"files": description.files | {"src/kohaku_delta/formats/parquet.py": "0" * 64}}
            )
        )
    )
    with pytest.raises(UserError, match=r"which differs in src/kohaku_delta/formats/parquet.py. Run `dvc repro`"):
        import_closure.verified_code(ROOT / "stages" / "caption.py")
    path.write_text("{}")
    with pytest.raises(UserError, match="the key stage is missing"):
        import_closure.verified_code(ROOT / "stages" / "caption.py")
