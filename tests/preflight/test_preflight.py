"""Each fault of a host fails one check of its own; every size agrees with independent arithmetic and real files."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from math import ceil
from pathlib import Path
from random import Random

import numpy as np
import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from kohaku_delta import params
from kohaku_delta.cli.main import main
from kohaku_delta.errors import UserError
from kohaku_delta.preflight import build_plan, estimates, host_checks, host_facts, parameter_counts
from kohaku_delta.preflight.host_facts import DiskFolder, Gpu, Host
from kohaku_delta.provenance import import_closure
from kohaku_delta.training import buckets, journal

ROOT = Path(__file__).resolve().parents[2]
RELEASE, MINIATURE = params.load(ROOT / "params.yaml"), params.load(ROOT / "miniature" / "params.yaml")


def locked(path):
    return {name: each.version for name, each in import_closure.locked_libraries(path).items()}


PILOT = params.load(ROOT / "pilot" / "params.yaml")
EPSILON = params.load(ROOT / "recipes" / "epsilon-rev1" / "params.yaml")
LOCKED = locked(ROOT / "requirements" / "cuda.txt")
GPU = Gpu("NVIDIA GeForce RTX 3090", 25_438_126_080, "8.6", 82)
TB, GB = 10**12, 10**9
# SDXL 1.0 and the release's LoKr as others count them: Stability AI's parameter counts, and the published preset on
# SDXL's shapes
SDXL = parameter_counts.ParameterCounts(
    "SDXL 1.0", 2_567_463_684, 123_060_480 + 694_659_840, 83_653_863, 384_645_360, 2_628, 384_534_384, 390_000_000
)
GOOD = Host(
    locked=LOCKED,
    model=SDXL,
    python="3.11.14",
    missing_tools=(),
    libraries=dict(LOCKED),
    numerics="",
    bitsandbytes="",
    gpus=(GPU, GPU),
    architectures=("sm_80", "sm_86", "sm_120"),
    driver="580.95.05",
    cuda="13.0",
    nccl="2.29.7",
    memory=64 * GB,
    shared_memory=8 * GB,
    missing_inputs=(),
    folders={name: DiskFolder(name, 1, 2 * TB, 0) for name in ("mirror", "build", "cache", "work")},
)


def failed(host, recipe=RELEASE):
    results = host_checks.run_checks(host, recipe)
    return {result.name.split(" of ")[0]: result for result in results if not result.ok}


def with_library(name, number):
    return replace(GOOD, libraries=LOCKED | {name: number})


def with_ranks(ranks, recipe=RELEASE):
    return recipe.model_copy(update={"execution": recipe.execution.model_copy(update={"ranks": ranks})})


def with_disk(free):
    return replace(GOOD, folders={name: replace(place, free=free) for name, place in GOOD.folders.items()})


def test_the_releases_own_host_with_the_lock_is_green():
    results = host_checks.run_checks(GOOD, RELEASE)
    assert not failed(GOOD) and len({result.name for result in results}) == len(results) == 16


@pytest.mark.parametrize(
    ("wrong", "name", "says", "remedy"),
    [
        (replace(GOOD, python="3.12.1"), "Python", "3.12.1", ".venv"),
        (replace(GOOD, missing_tools=("dvc", "git")), "dvc, git", "missing: dvc, git", "PATH"),
        (with_library("safetensors", "0.7.0"), "libraries", "safetensors 0.7.0 (lock: 0.8.0)", "install the lock"),
        (
            replace(GOOD, libraries={name: number for name, number in LOCKED.items() if name != "tqdm"}),
            "libraries",
            "tqdm is missing",
            "install the lock",
        ),
        (replace(GOOD, bitsandbytes="its native library did not load"), "bitsandbytes", "did not load", "driver"),
        (
            replace(GOOD, network_weights="lyco.safetensors is not a LoKr of this recipe:\n  missing: x"),
            "LoKr to start from",
            "of this recipe: missing: x",
            "download.inputs",
        ),
        (
            replace(GOOD, numerics="This processor offers DEFAULT; the recipe needs AVX2."),
            "numerics",
            "AVX2",
            "sentence",
        ),
        (replace(GOOD, gpus=()), "GPUs", "none is visible", "--gpus all"),
        (
            replace(GOOD, gpus=(GPU,)),
            "GPUs",
            "1 (NVIDIA GeForce RTX 3090), for 2 ranks",
            "set execution.ranks in params.yaml to 1",
        ),
        (
            replace(
                GOOD, gpus=(GPU, replace(GPU, name="NVIDIA GeForce RTX 4090", architecture="8.9", multiprocessors=128))
            ),
            "same GPU",
            "82 multiprocessors / ",
            "CUDA_VISIBLE_DEVICES",
        ),
        (replace(GOOD, gpus=(GPU, replace(GPU, multiprocessors=80))), "same GPU", "80 multiprocessors", "one kind"),
        (replace(GOOD, gpus=(replace(GPU, architecture="6.1"),) * 2), "architecture", "sm_61", "no code"),
        (replace(GOOD, gpus=(replace(GPU, architecture="9.0"),) * 2), "architecture", "sm_90", "no code"),
        (replace(GOOD, gpus=(replace(GPU, memory=12 * GB),) * 2), "GPU memory", "12 GB per GPU", "larger"),
        (replace(GOOD, gpus=(replace(GPU, memory=20 * GB),) * 2), "GPU memory", "20 GB per GPU", "less may do"),
        (replace(GOOD, driver=""), "driver", "none answers", "580"),
        (replace(GOOD, driver="570.133.20"), "driver", "570.133.20", "580"),
        (replace(GOOD, cuda="12.8"), "CUDA", "12.8 (lock: 13.0)", "requirements/cuda.txt"),
        (replace(GOOD, cuda=""), "CUDA", "CPU build", "requirements/cuda.txt"),
        (replace(GOOD, nccl="2.27.5"), "NCCL", "2.27.5 (lock: 2.29.7)", "LD_LIBRARY_PATH"),
        (replace(GOOD, memory=8 * GB), "memory", "8 GB", "swap"),
        (replace(GOOD, shared_memory=64 << 20), "shared memory", "67.1 MB", "--shm-size"),
        (
            replace(GOOD, missing_inputs=("supplied/kohakuXLGamma_rev2.safetensors",)),
            "supplied inputs",
            "kohakuXLGamma_rev2",
            "merge.start: published",
        ),
        (with_disk(TB), "disk", "1 TB free", "download.mirror"),
    ],
)
def test_what_is_wrong_is_one_red_line_with_its_remedy(wrong, name, says, remedy):
    found = failed(wrong)
    assert set(found) == {name} and says in found[name].what and remedy in found[name].remedy, found


@pytest.mark.parametrize(
    ("number", "says"),
    [
        ("0.36.0", "broken"),
        ("0.39.1", "broken"),
        ("0.41.0", "broken"),
        ("0.42.0", "rounds differently"),
        ("0.50.3", "rounds differently"),
    ],
)
def test_a_bitsandbytes_other_than_the_locks_is_forbidden(number, says):
    found = failed(with_library("bitsandbytes", number))
    assert set(found) == {"bitsandbytes", "libraries"} and says in found["bitsandbytes"].what


def test_a_host_without_git_is_green_for_dvc_does_without(monkeypatch):
    assert not failed(replace(GOOD, missing_tools=("git",)))
    monkeypatch.setattr(host_facts.shutil, "which", lambda tool: None)
    probed = {
        "numerics": "",
        "bitsandbytes": "",
        "gpus": [],
        "architectures": [],
        "cuda": "",
        "nccl": "",
        "model": None,
        "network_weights": None,
    }
    monkeypatch.setattr(host_facts, "_probe", lambda params: probed)
    host = host_facts.inspect_host(MINIATURE, ROOT / "miniature" / "params.yaml")
    assert host.missing_tools == ("dvc", "git") and host.model is None
    assert list(failed(host, MINIATURE)) == ["dvc, git"]


def test_what_preflight_repeats_is_what_training_says():
    from kohaku_delta.training import batch_builder

    assert estimates.MICRO_BATCHES_AHEAD == batch_builder.AHEAD + 1


def test_ranks_that_do_not_divide_the_lanes_are_told_so():
    assert "does not divide 8 lanes" in failed(replace(GOOD, gpus=(GPU,) * 3), with_ranks(3))["GPUs"].what


def test_folders_on_two_disks_are_judged_apart_and_what_is_there_counts():
    folders = dict(GOOD.folders) | {"mirror": DiskFolder("mirror", 2, 50 * GB, 0)}
    results = {each.name: each for each in host_checks.run_checks(replace(GOOD, folders=folders), RELEASE)}
    assert not results["disk of mirror"].ok and results["disk of build, cache, work"].ok
    folders["mirror"] = replace(folders["mirror"], present=1629 * GB)
    assert not failed(replace(GOOD, folders=folders))


def run(*arguments, host=None, monkeypatch=None, color=False):
    if host is not None:
        monkeypatch.setattr(host_facts, "inspect_host", lambda recipe, params: host)
    return CliRunner().invoke(main, ["preflight", *arguments], color=color)


def test_exit_codes_colours_and_remedies(monkeypatch):
    done = run(host=GOOD, monkeypatch=monkeypatch)
    assert done.exit_code == 0 and "16 of 16 are green" in done.output and "\x1b" not in done.output
    done = run(host=replace(GOOD, driver="470.1", shared_memory=0), monkeypatch=monkeypatch)
    assert (
        done.exit_code == 1
        and "red: shared memory, driver" in done.output
        and done.output.count("→") == 2
        and "\x1b" not in done.output
    )
    assert "\x1b[31m" in run(host=replace(GOOD, driver=""), monkeypatch=monkeypatch, color=True).output
    done = run("--params", "nowhere.yaml")
    assert done.exit_code == 2 and "in a recipe's folder" in done.output


@pytest.mark.parametrize(
    "text",
    ["", "RTX 3090", "0x RTX 3090", "99999999999x RTX 3090", "2x", "2x RTX 3090, 24", "2x RTX 3090, memory lots",
     "2x Voodoo 2", "2x RTX 3090, memory 64 GB, memory 32 GB"],
)  # fmt: skip
def test_a_description_that_says_nothing_is_refused_with_an_example(text):
    done = run("--simulate", text)
    assert done.exit_code == 2 and "RTX 3090" in done.output and "Traceback" not in done.output


def test_what_a_description_does_not_name_is_said_and_a_time_must_be_a_number():
    done = run("--simulate", "2x RTX 3090, disk 2 TB")
    assert "not checked, because --simulate does not name it: memory\n" in done.output
    for seconds in ("nan", "inf"):
        done = run("--simulate", "2x RTX 3090", "--seconds-per-step", seconds)
        assert done.exit_code == 2 and "a number of seconds" in done.output


@pytest.mark.ci
def test_this_host_can_make_the_miniature_and_dvc_asks_first():
    stage = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]["download"]
    assert stage["cmd"] == "kohaku-delta preflight && kohaku-delta stage download"
    done = subprocess.run(
        [sys.executable, "../src/kohaku_delta", "preflight"],
        cwd=ROOT / "miniature",
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0 and "are green" in done.stdout and "GPU" not in done.stdout, done.stdout + done.stderr


@pytest.fixture(scope="module")
def release():
    """The release's model and LoKr, counted without a checkpoint at hand."""
    return parameter_counts.count_parameters(RELEASE, ROOT)


def test_the_releases_sizes_are_the_published_ones(release):
    assert (release.unet, release.text, release.vae, release.lokr) == (SDXL.unet, SDXL.text, SDXL.vae, SDXL.lokr)
    assert estimates.lokr_bytes(release) == 769_290_720
    assert (
        0 < RELEASE.published.final.bytes - estimates.checkpoint_bytes(RELEASE, release) < 1_000_000
    )  # header, position_ids, logit_scale
    lost = (
        4 * (768 // 8) ** 2 + 2 * (768 // 8) * (3072 // 8) + 6 * 8 * 8
    )  # text encoder 1's last layer: q, k, v, out, fc1, fc2
    assert release.trained == release.lokr - lost


def test_what_is_fetched_and_kept_adds_up(release):
    pinned = 15_443_382_272 + 6_938_078_334 + 6_938_046_250 + 2 * (1_059_962 + 524_619)
    assert estimates.total(estimates.download_sizes(RELEASE, release)) == pinned + 1_600_000_000_000
    assert estimates.milestones(RELEASE) == list(range(2000, 28_001, 2000)) and len(estimates.milestones(RELEASE)) == 14
    each = 2 * 384_645_360 + release.optimizer
    assert 384_534_384 < release.optimizer < 1.03 * 384_645_360  # a byte each, and 4 bytes a block of 256
    assert estimates.state_bytes(RELEASE, release) == each
    lokrs = next(size for size in estimates.build_sizes(RELEASE, release) if "LoKr files" in size.what)
    assert lokrs.bytes == 14 * 769_290_720, "build/milestones has one per milestone"
    assert (
        14 * (each + 769_290_720) + 3 * each
        < estimates.total(estimates.state_sizes(RELEASE, release))
        < 14 * (each + 769_290_720) + 3 * each + 17 * 28_638 * 4096
    )
    picture, noise = 4 * 3 * 1024 * 1024, 2 * 4 * 4 * 128 * 128 * 4
    assert estimates.shared_memory(RELEASE) == 2 * 4 * 5 * (picture + noise) + GB


# GiB at the peak of a full-size step, from `make bench-train`: the loop itself, on fake tensors
PLANNED = {1: 17.93, 2: 16.49, 4: 15.06, 8: 13.63}


@pytest.mark.parametrize("ranks", PLANNED)
def test_the_cards_memory_is_that_of_a_step_on_fake_tensors_and_stays_under_22_gib(release, ranks):
    recipe = with_ranks(ranks)
    planned = estimates.total(estimates.gpu_memory_parts(recipe, release))
    assert planned == pytest.approx(PLANNED[ranks] * 2**30, rel=0.005)
    assert estimates.gpu_memory(recipe, release) - planned == estimates.GPU_SPARE and planned < 22 * 2**30


@pytest.mark.slow
@pytest.mark.parametrize("ranks", PLANNED)
def test_a_step_on_fake_tensors_allocates_what_the_plan_says(ranks):
    """The loop itself at full size, half a minute for each number of ranks; in a process of its own, as it patches."""
    code = (
        "from kohaku_delta import numerics, params; numerics.enforce('cpu'); import memory_plan, pyarrow as pa; "
        "rows = pa.table({name: pa.array([0], pa.int32()) for name in ('step', 'lane', 'place')}); "
        f"print(max(memory_plan.peak_bytes(params.load('params.yaml'), rows, {ranks}).values()))"
    )
    paths = {"PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT / 'src'}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | paths)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == pytest.approx(PLANNED[ranks] * 2**30, rel=0.001)


def test_main_memory_at_the_start_is_what_a_process_was_measured_to_take(release):
    """A rank's base of SDXL's size loaded, and its LoKr made: 9.11 GB of resident memory at most, without tables."""
    tables = estimates.POST_BYTES * 3_665_398
    assert estimates.host_memory(with_ranks(1), release) - tables == pytest.approx(9.11e9, rel=0.02)
    assert estimates.host_memory(with_ranks(2), release) == 2 * estimates.host_memory(with_ranks(1), release)


def test_a_training_on_the_cpu_holds_a_whole_step_in_main_memory(release):
    cpu = with_ranks(1).model_copy(update={"train": RELEASE.train.model_copy(update={"device": "cpu"})})
    step = estimates.total(estimates.gpu_memory_parts(cpu, release))
    assert estimates.host_memory(cpu, release) > step > estimates.host_memory(with_ranks(1), release)


@pytest.mark.parametrize(
    "kind, counted",
    [
        ("hardlink,symlink", False),
        pytest.param("reflink", False, marks=pytest.mark.slow),
        pytest.param("reflink,copy", True, marks=pytest.mark.slow),
        ("", True),
    ],
)
def test_dvcs_cache_needs_room_only_where_it_is_a_second_copy(tmp_path, monkeypatch, kind, counted):
    subprocess.run(["dvc", "init", "--no-scm", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run(["dvc", "cache", "dir", str(tmp_path / "elsewhere")], cwd=tmp_path, check=True, capture_output=True)
    if kind:
        subprocess.run(["dvc", "config", "cache.type", kind], cwd=tmp_path, check=True)
    assert Path(host_facts._ask_dvc(tmp_path, "cache", "dir")) == tmp_path / "elsewhere"
    folders = host_facts._without_second_copies(tmp_path, GOOD.folders)
    assert ("cache" in folders) == counted
    apart = GOOD.folders | {"cache": replace(GOOD.folders["cache"], device=2)}
    assert "cache" in host_facts._without_second_copies(tmp_path, apart)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_buffers_are_those_that_the_tree_holds(ranks):
    import torch

    from kohaku_delta.training.gradient_reduction import PairwiseSum

    tree, most = PairwiseSum(), 0
    for _ in range(8 // ranks):
        most = max(most, len(tree.levels) + 1)
        tree.add(torch.zeros(1))
    assert estimates.gradient_buffers(RELEASE, ranks) == most


def test_the_miniatures_sizes_are_those_of_its_files():
    from kohaku_delta import numerics
    from kohaku_delta.sdxl import model_loading
    from kohaku_delta.training import optimizer
    from kohaku_delta.training.lokr import LokrAdapter

    numerics.enforce()
    import torch

    numbers = parameter_counts.count_parameters(MINIATURE, ROOT / "miniature")
    checkpoint = ROOT / "data" / "checkpoints" / "sdxl.safetensors"
    models = {
        name: module.requires_grad_(False) for name, module in model_loading.load(checkpoint, MINIATURE.model).items()
    }
    adapter = LokrAdapter(models, MINIATURE.lokr, torch.float32)
    trained = adapter.trained()
    lion = optimizer.Lion(trained, MINIATURE.train)
    lion.step(0, torch.zeros(sum(weight.numel() for _, weight in trained)), optimizer.LossScaler(False))
    tensors = adapter.tensors()
    assert (numbers.entries, numbers.trained) == (len(tensors), sum(weight.numel() for _, weight in trained))
    assert estimates.state_bytes(MINIATURE, numbers) == sum(
        each.nbytes for each in (*tensors.values(), *lion.tensors().values())
    )
    outs = YAML(typ="safe", pure=True).load((ROOT / "miniature" / "dvc.lock").read_text())["stages"]
    sizes = {out["path"]: out["size"] for stage in outs.values() for out in stage.get("outs", [])}
    assert (
        0 <= sizes["build/delta-lokr.safetensors"] - estimates.lokr_bytes(numbers) < 256 * numbers.entries
    )  # its header, large beside so small a model
    for name in ("build/delta-base.safetensors", "build/kohaku-xl-delta.safetensors", "build/diffusers"):
        assert 0 <= sizes[name] - estimates.checkpoint_bytes(MINIATURE, numbers) < 0.05 * sizes[name], name


def test_the_journal_grows_as_counted(tmp_path):
    numbers, rows = Random(1), 300
    said = journal.Journal({})
    for step in range(rows):
        digest = numbers.randbytes(32).hex()
        floats = {
            name: numbers.random() for name in ("gradient_norm", "learning_rate_unet", "learning_rate_text", "scale")
        }
        prints = {
            "weights": numbers.getrandbits(64),
            "optimizer": numbers.getrandbits(64),
            "lanes": [numbers.getrandbits(64) for _ in range(8)],
        }
        said.append(
            {
                "step": step,
                "visits": digest,
                "losses": [numbers.random() for _ in range(32)],
                "tensors": numbers.randbytes(SDXL.entries),
            }
            | floats
            | prints
        )
    said.write(tmp_path / "journal.parquet")
    assert (
        0.95 < rows * estimates.journal_row_bytes(RELEASE, SDXL) / (tmp_path / "journal.parquet").stat().st_size < 1.15
    )


def test_the_plan_names_a_source_for_every_figure_and_measures_nothing_by_itself(release):
    def plan(description, seconds=None):
        host = build_plan.parse_host(description, LOCKED, release)
        return {row.what: row for row in build_plan.plan_rows(RELEASE, host, seconds)}

    known, other, measured = plan("2x RTX 3090, disk 3 TB"), plan("2x RTX 4090"), plan("2x Later Card, 32 GB", 20.0)
    assert all(row.source for row in known.values())
    assert known["time per step"].figure == "51.25 s" and "model card" in known["time per step"].source
    assert known["training"].figure == "17.0 days"
    assert known["decoding all images"].figure == "48 core hours"  # 3,665,398 / 21 / 3600 = 48.5
    assert "24.2 h on 2 cores, 3.0 h on 16 cores, 1.5 h on 32 cores" in known["decoding all images"].source
    assert known["steps"].figure == "28,638" and known["disk in all"].figure == "1.74 TB"
    assert other["time per step"].figure == "not measured" and "training" not in other
    assert measured["training"].figure == "6.6 days"
    assert measured["time per step"].source.startswith("--seconds-per-step")


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_lock_is_read_whole(name):
    path = ROOT / "requirements" / f"{name}.txt"
    said = dict(re.findall(r"^([a-z0-9.-]+)==([^ ;]+)", path.read_text(), re.M))
    assert locked(path) == {each.replace(".", "-"): number for each, number in said.items()}


@pytest.mark.parametrize("text", ["torch>=2 --hash=sha256:00\n", "torch==2.13.0\n", "???\n"])
def test_a_lock_that_does_not_lock_is_refused(tmp_path, text):
    (tmp_path / "cpu.txt").write_text(text)
    with pytest.raises(UserError, match="Restore the file"):
        locked(tmp_path / "cpu.txt")


def test_a_probe_that_dies_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(
        host_facts.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -11, "", "Segmentation fault")
    )
    with pytest.raises(UserError, match="Segmentation fault"):
        host_facts._probe(ROOT / "params.yaml")
    monkeypatch.setattr(
        host_facts.subprocess,
        "run",
        lambda *_, **__: subprocess.CompletedProcess([], 0, "noise\n" + json.dumps({"cuda": ""}) + "\n", ""),
    )
    assert host_facts._probe(ROOT / "params.yaml") == {"cuda": ""}


@pytest.mark.ci
def test_an_sdxl_that_is_no_checkpoint_is_a_sentence(tmp_path):
    (tmp_path / "sdxl.safetensors").write_bytes(b"\xff" * 4096)
    text = (
        (ROOT / "miniature" / "params.yaml")
        .read_text()
        .replace("root: ..", f"root: {ROOT}")
        .replace("../data/checkpoints/sdxl", f"{tmp_path}/sdxl")
    )
    (tmp_path / "params.yaml").write_text(text)
    done = run("--params", str(tmp_path / "params.yaml"))
    assert done.exit_code == 2 and "sdxl.safetensors" in done.output and "Traceback" not in done.output


def own(tmp_path, base, start="published", **inputs):
    """The miniature's params.yaml with another base, and no other checkpoint."""
    content = YAML(typ="safe", pure=True).load((ROOT / "miniature" / "params.yaml").read_text())
    content["root"], content["merge"]["start"] = str(ROOT), start
    content["download"]["inputs"] = {"delta_base": base, **inputs}
    path = tmp_path / "params.yaml"
    with open(path, "w") as file:
        YAML(typ="safe", pure=True).dump(content, file)
    return path


HUB = "hf://owner/model@" + "0" * 40


def test_a_local_base_without_a_pinned_size_is_planned_as_the_file_that_it_is(tmp_path):
    path = own(tmp_path, {"url": f"file://{ROOT}/data/checkpoints/sdxl.safetensors", "bytes": None, "sha256": None})
    done = run("--params", str(path), "--simulate", "1x RTX 3090, memory 64 GB, disk 2 TB")
    assert re.search(r"final model, diffusers folder +15\.5 MB", done.output), (
        done.output
    )  # three files of 5.17 MB of tensors
    assert not re.search(r"build and cache +\d+(\.\d+)? GB", done.output)


@pytest.mark.parametrize("size", [None, 5_286_744])
def test_a_base_that_is_not_at_hand_and_not_as_large_as_sdxl_has_a_size_that_is_not_known(tmp_path, size):
    database = {"url": f"{HUB}/own.db", "bytes": None, "sha256": None}
    path = own(tmp_path, {"url": f"{HUB}/base.safetensors", "bytes": size, "sha256": None}, database=database)
    done = run("--params", str(path), "--simulate", "1x RTX 3090, memory 64 GB, disk 2 TB")
    assert re.search(r"size of the model +not known", done.output) and re.search(
        r"database +not known +no size is pinned", done.output
    ), done.output
    assert "49" not in done.output and "TB" not in done.output and not re.search(r"\d GB  ", done.output)


def test_a_base_as_large_as_sdxl_is_planned_as_sdxl(tmp_path):
    path = own(tmp_path, {"url": f"{HUB}/base.safetensors", "bytes": 6_938_040_286, "sha256": None})
    assert parameter_counts.count_parameters(params.load(path), tmp_path).of == "SDXL 1.0"


def test_a_range_that_takes_all_of_an_unknown_database_is_not_planned_as_no_posts(tmp_path):
    recipe = MINIATURE.model_copy(update={"published": None})
    found = estimates.build_sizes(recipe, parameter_counts.count_parameters(recipe, ROOT / "miniature"))[-1]
    assert found.bytes is None and "counts the posts" in found.source


def test_the_states_of_finished_runs_and_of_those_set_aside_make_no_room_for_the_next(tmp_path):
    for name, saved in (("a" * 16, 58), ("b" * 16, 40), ("c" * 16 + ".set-aside", 12), ("lost+found", 12)):
        state = tmp_path / name / f"step-{saved:08d}"
        state.mkdir(parents=True)
        (state / "state.safetensors").write_bytes(bytes(1000 + saved))
        (tmp_path / name / "depends.json").write_text('{"steps": 58, "depends": {}}')
    (tmp_path / ("d" * 16)).mkdir()
    (tmp_path / ("d" * 16) / "depends.json").write_text("[" * 100_000)
    unfinished = host_facts._unfinished_runs(tmp_path)
    assert unfinished == [tmp_path / ("b" * 16)]
    present = host_facts._disk_folder(tmp_path, unfinished).present
    assert present == 1040 + len('{"steps": 58, "depends": {}}')
    assert host_facts._disk_folder(tmp_path / "missing", []).present == 0


def test_epsilons_steps_and_days_are_the_published_ones(release):
    """12 to 13 days were published as the cost; 49 to 50 s per step are 11.5 to 11.8 of them (docs/epsilon.md)."""
    host = build_plan.parse_host("4x RTX 3090, memory 128 GB, disk 4 TB", LOCKED, release)
    rows = {row.what.strip(): row for row in build_plan.plan_rows(EPSILON, host, None)}
    assert rows["steps"].figure == "20,354" and "20,353 to 20,354 follow" in rows["steps"].source
    assert rows["time per step"].figure == "49.5 s" and "12 to 13 days" in rows["time per step"].source
    assert rows["training"].figure == "11.7 days"
    assert rows["database"].figure == "not known"
    assert not [each for each in host_checks.run_checks(host, EPSILON) if not each.ok]
    other = build_plan.parse_host("2x RTX 3090", LOCKED, release)
    plan = {row.what: row for row in build_plan.plan_rows(with_ranks(2, EPSILON), other, None)}
    assert plan["time per step"].figure == "not measured", "Epsilon's time is that of four cards"


@pytest.mark.parametrize("recipe", [RELEASE, EPSILON], ids=["Delta", "Epsilon"])
def test_the_published_steps_follow_from_the_published_posts(recipe):
    """However the images fall into buckets, their steps lie within the bounds."""
    schedule, count = recipe.schedule, recipe.published.dataset.posts
    number, numbers = len(buckets.all_buckets(schedule)), np.random.default_rng(1)

    def steps(images):
        batches = sum(ceil(each / schedule.batch_size) for each in images)
        return schedule.epochs * ceil(batches / schedule.micro_batches)

    fewest, most = estimates.steps_of_published_posts(recipe)
    assert fewest <= recipe.published.dataset.steps <= most
    assert steps([count]) == fewest and steps([1] * (number - 1) + [count - number + 1]) == most
    for _ in range(200):
        assert fewest <= steps(numbers.multinomial(count, numbers.dirichlet([0.3] * number)).tolist()) <= most
    twice = recipe.model_copy(update={"schedule": schedule.model_copy(update={"epochs": 2})})
    assert estimates.steps_of_published_posts(twice) == (2 * fewest, 2 * most)


def test_the_pilots_plan_is_under_thirty_gigabytes_to_fetch_and_twenty_steps(release):
    host = build_plan.parse_host("1x RTX 4090, memory 64 GB, disk 200 GB", LOCKED, release)
    rows = {row.what.strip(): row for row in build_plan.plan_rows(PILOT, host, 102.5)}
    downloads = {each.what: each.bytes for each in estimates.download_sizes(PILOT, release)}
    assert downloads["3 tars"] == 4_800_000_000 and not {"sdxl", "beta", "gamma", "index"} & downloads.keys()
    assert sum(downloads.values()) < 30 * GB and rows["download into the mirror"].figure == "27.2 GB"
    assert rows["steps"].figure == "20" and rows["steps"].source == "schedule.max_steps"
    assert rows["training"].figure == "34 min 10 s"  # 20 × 51.25 s × 2 cards of the release
    assert rows["a power cut costs"].figure == "up to 0.3 h"  # ten steps, to the milestone
    assert rows["states never deleted"].figure == "2"
    assert not [each for each in host_checks.run_checks(host, PILOT) if not each.ok]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "other", [{"name": "NVIDIA GeForce RTX 4090"}, {"multiprocessors": 80}, {"architecture": "8.9"}]
)
def test_a_pilot_on_two_unlike_cards_is_refused(ranks, other):
    pilot = PILOT.model_copy(update={"execution": PILOT.execution.model_copy(update={"ranks": ranks})})
    found = failed(replace(GOOD, gpus=(GPU, replace(GPU, **other))), pilot)
    assert set(found) == {"same GPU"} and "CUDA_VISIBLE_DEVICES" in found["same GPU"].remedy


def test_a_pilot_is_green_on_one_card_and_refused_on_a_small_one_or_on_a_full_disk():
    assert not failed(replace(with_disk(120 * GB), gpus=(GPU,)), PILOT)
    found = failed(replace(with_disk(60 * GB), gpus=(GPU,)), PILOT)
    assert set(found) == {"disk"} and "60 GB free, 87.7 GB to come: mirror 27.2 GB" in found["disk"].what
    assert set(failed(replace(GOOD, gpus=(replace(GPU, memory=12 * GB),)), PILOT)) == {"GPU memory"}
