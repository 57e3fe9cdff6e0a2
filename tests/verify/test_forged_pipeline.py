"""The pipeline that was run is the one that the auditor knows, its code is described whole, and pins cannot be talked
away. Every forgery here is consistent: dvc.yaml, dvc.lock and the records agree, so one check alone finds it.
"""

import copy as copies
import json
import shutil

import pytest
import yaml

import rebuild_factory
from kohaku_delta.provenance import import_closure
from kohaku_delta.provenance.artifact import open_artifact
from kohaku_delta.verify import check_lock, check_lock_inputs, known_code
from tampering import ask, audit, failed, locked, rehash_everything, sealed

ROOT = rebuild_factory.ROOT


@pytest.fixture(scope="module")
def bundle(untampered_rebuild, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "honest"
    assert ask("bundle", path, "--recipe", untampered_rebuild)[0] == 0
    return path


CHECKS = {
    "lock/pipeline": check_lock.check_pipeline,
    "lock/parameters": check_lock.check_parameters,
    "lock/links": check_lock.check_links,
    "lock/outs": check_lock.check_outputs,
    "lock/bundle": lambda rebuild: check_lock.check_bundle(rebuild, rebuild.bundle),
    "lock/code": check_lock_inputs.check_code,
    "lock/pins": check_lock_inputs.check_pins,
}


def found_by(check, target) -> tuple[str, str]:
    """(status, sentence) of one check alone: a whole audit of each forgery would take minutes."""
    with open_artifact(target) as rebuild:
        finding = CHECKS[check](rebuild)
    print(f"{check}: {finding.status} {finding.message}")
    return finding.status, finding.message


def test_other_files_of_dvc_are_named(copy):
    for name in ("more.dvc", "build/dvc.yaml"):
        (copy / name).write_text("stages: {}\n")
    status, message = found_by("lock/pipeline", copy)
    assert status == "PASS" and message.endswith("; not looked at: dvc.yaml, more.dvc")


def test_a_program_without_its_checkout_cannot_judge(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(known_code, "REPOSITORY", tmp_path)
    for check in ("lock/pipeline", "lock/code"):
        assert found_by(check, copy)[0] == "SKIP"


def test_a_whole_audit_fails_of_one_forged_line(copy, monkeypatch):
    write_pipeline(copy, stage("train", frozen=True), monkeypatch)
    code, found = audit(copy)
    assert code == 1 and list(failed(found)) == ["lock/pipeline"]


def stage(name, **entries):
    """A change of one stage's entry: keys are added, or replaced by what a function makes of them."""

    def change(pipeline):
        entry = pipeline["stages"][name]
        for key, value in entries.items():
            entry[key] = value(entry[key]) if callable(value) else value

    return change


def top(**entries):
    return lambda pipeline: pipeline.update(entries)


def without_code(pipeline):
    for entry in pipeline["stages"].values():
        entry["deps"] = [dep for dep in entry["deps"] if not dep.startswith("build/code/")]


def extra_stage(pipeline):
    pipeline["stages"]["polish"] = {"cmd": "kohaku-delta stage polish", "deps": ["params.yaml"], "params": ["model"]}


PIPELINES = {  # what → (change of dvc.yaml, the key that is named)
    "a library loaded before a stage": (stage("train", cmd="LD_PRELOAD=./x.so kohaku-delta stage train"), "train.cmd"),
    "a variable before a stage": (stage("train", cmd="PYTHONPATH=. kohaku-delta stage train"), "train.cmd"),
    "another command after a stage": (stage("bake", cmd=lambda cmd: f"{cmd} && python retouch.py"), "bake.cmd"),
    "options of a stage": (stage("bake", cmd=lambda cmd: f"{cmd} --scale 0.5"), "bake.cmd"),
    "another script": (stage("merge", cmd="kohaku-delta stage bake"), "merge.cmd"),
    "another folder to run in": (stage("train", wdir="."), "train.wdir"),
    "a frozen stage": (stage("train", frozen=True), "train.frozen"),
    "a stage that always runs": (stage("train", always_changed=True), "train.always_changed"),
    "a description": (stage("train", desc="trained as the recipe says"), "train.desc"),
    "meta": (stage("train", meta={"verified": True}), "train.meta"),
    "an output outside of the cache": (
        stage("bake", outs=[{"build/kohaku-xl-delta.safetensors": {"cache": False}}]), "bake.outs"),
    "an output that is kept": (
        stage("bake", outs=[{"build/kohaku-xl-delta.safetensors": {"persist": True}}]), "bake.outs"),
    "an output of another remote": (
        stage("bake", outs=[{"build/kohaku-xl-delta.safetensors": {"remote": "theirs"}}]), "bake.outs"),
    "an input more": (stage("train", deps=lambda deps: [*deps, "params.yaml"]), "train.deps"),
    "an input less": (stage("train", deps=lambda deps: [dep for dep in deps if "captions" not in dep]), "train.deps"),
    "no code among the inputs": (without_code, "deps"),
    "a parameter less": (stage("train", params=lambda keys: keys[:-1]), "train.params"),
    "a parameter in place of another": (stage("train", params=lambda keys: [*keys[:-1], "bake"]), "train.params"),
    "a stage more": (extra_stage, "stages.polish"),
    "a stage less": (lambda pipeline: pipeline["stages"].pop("milestones"), "stages.milestones"),
    "variables": (top(vars=[{"scale": 2}]), "vars"),
    "artifacts": (top(artifacts={"model": {"path": "build/kohaku-xl-delta.safetensors"}}), "artifacts"),
    "other plots": (top(plots=[]), "plots"),
    "metrics": (top(metrics=["build/dataset.json"]), "metrics"),
    "data sets": (top(datasets=[]), "datasets"),
    "a metric that is a plain output": (
        lambda pipeline: pipeline["stages"]["preview"].update(
            outs=pipeline["stages"]["preview"]["outs"] + pipeline["stages"]["preview"].pop("metrics")), "preview."),
}  # fmt: skip


def write_pipeline(folder, change, monkeypatch) -> None:
    """dvc.yaml with its content changed, and lock and records of a run of it."""
    pipeline = copies.deepcopy(rebuild_factory.loaded(ROOT / "dvc.yaml"))
    change(pipeline)
    rebuild_factory.dump(folder / "dvc.yaml", pipeline)
    plain = copies.deepcopy(pipeline["stages"])
    for entry in plain.values():  # as the factory reads them
        entry["outs"] = [path for out in entry.get("outs", []) for path in ([out] if isinstance(out, str) else out)]
    monkeypatch.setattr(rebuild_factory, "STAGES", plain)
    rehash_everything(folder)


@pytest.mark.ci
@pytest.mark.parametrize("what", PIPELINES)
def test_another_pipeline_is_found_although_everything_agrees_with_it(copy, monkeypatch, what):
    change, key = PIPELINES[what]
    write_pipeline(copy, change, monkeypatch)
    status, message = found_by("lock/pipeline", copy)
    assert status == "FAIL" and key in message and "is not as in the code at hand" in message


@pytest.mark.parametrize("entry", [
    {"foreach": ["a", "b"], "do": {"cmd": "kohaku-delta stage train"}},
    {"matrix": {"seed": [1, 2]}, "cmd": ["kohaku-delta stage train"]},
    {"cmd": ["kohaku-delta stage train", "python retouch.py"]},
])  # fmt: skip
def test_stages_of_another_form_are_refused(copy, entry):
    pipeline = rebuild_factory.loaded(copy / "dvc.yaml")
    pipeline["stages"]["train"] = entry
    rebuild_factory.dump(copy / "dvc.yaml", pipeline)
    code, output = ask("audit", copy)
    assert code == 2 and "dvc.yaml: stages.train" in output.replace("the key ", ""), output


def test_the_same_pipeline_in_another_form_is_no_forgery(copy):
    """As git writes it on other systems, and as other programs write YAML."""
    text = (copy / "dvc.yaml").read_bytes()
    for other in (text.replace(b"\n", b"\r\n"), yaml.safe_dump(yaml.safe_load(text)).encode()):
        (copy / "dvc.yaml").write_bytes(other)
        assert found_by("lock/pipeline", copy)[0] == "PASS"


def lock_of_other_parameters(folder):
    locked(folder, lambda stages: stages["train"]["params"].update({"other.yaml": {"train": {"seed": 1}}}))


def lock_of_other_counts(folder):
    locked(folder, lambda stages: stages["export"]["outs"][0].update(nfiles=99))


def dep_of_other_counts(folder):
    def change(stages):
        (dep,) = [dep for dep in stages["milestones"]["deps"] if dep["path"] == "build/milestones"]
        dep.update(nfiles=99)

    locked(folder, change)


def described_code(change):
    """build/code changed, and everything hashed anew. change: of {stage: content}."""

    def attack(folder):
        files = {path.stem: path for path in (folder / "build" / "code").iterdir()}
        contents = {name: json.loads(path.read_text()) for name, path in files.items()}
        change(contents)
        for name, path in files.items():
            path.write_text(import_closure.dumps(import_closure.StageCode(**contents[name])))
        rehash_everything(folder)

    return attack


def no_files(contents):
    for content in contents.values():
        content["files"] = {}


def of_another_stage(contents):
    contents["train"] = contents["select"]


def only_the_script(contents):
    contents["train"]["files"] = {
        name: digest for name, digest in contents["train"]["files"].items() if name == "stages/train.py"
    }


def one_file_less(contents):
    del contents["train"]["files"]["src/kohaku_delta/training/optimizer.py"]


def one_file_more(contents):
    contents["train"]["files"]["src/kohaku_delta/retouch.py"] = "7" * 64


def a_file_elsewhere(contents):
    contents["train"]["files"]["../../../etc/passwd"] = "7" * 64


LOCKS = {
    "parameters of another file": (lock_of_other_parameters, "lock/parameters", "has parameters of other.yaml"),
    "another number of files of an output":
        (lock_of_other_counts, "lock/outs", " files, dvc.lock says 99"),
    "another number of files of an input": (dep_of_other_counts, "lock/links", "milestones read build/milestones"),
    "a file that nobody hashes": (
        lambda folder: (folder / "build" / "diffusers" / "unet" / "x.pyc").write_text("x"),
        "lock/outs",
        "build/diffusers (of export) also holds unet/x.pyc, which neither DVC nor the audit hashes",
    ),
    "a folder of files that nobody hashes": (
        lambda folder: shutil.copytree(folder / "build" / "code", folder / "build" / "samples" / "__pycache__"),
        "lock/outs",
        "build/samples (of preview) also holds __pycache__/bake.json",
    ),
    "no file of code": (described_code(no_files), "lock/code", "does not name stages/"),
    "code of another stage": (described_code(of_another_stage), "lock/code", "does not name stages/train.py"),
    "the script alone": (described_code(only_the_script), "lock/code", "more: not what build/code"),
    "a file of code less": (described_code(one_file_less), "lock/code", "training/optimizer.py: not what build/code"),
    "a file of code more": (described_code(one_file_more), "lock/code", "src/kohaku_delta/retouch.py"),
    "a file that is no code": (described_code(a_file_elsewhere), "lock/code", "../../../etc/passwd"),
}  # fmt: skip


def inputs(change):
    """inputs.json changed, and everything hashed anew. change: of its content."""

    def attack(folder):
        path = folder / "build" / "inputs.json"
        content = json.loads(path.read_text())
        change(content, content["inputs"])
        path.write_text(json.dumps(content))
        rehash_everything(folder)

    return attack


def input_value(name, /, **values):
    def change(_, listed):
        entry = listed[name]
        (entry[0] if isinstance(entry, list) else entry).update(values)

    return inputs(change)


def parameters(change):
    def attack(folder):
        content = rebuild_factory.loaded(folder / "params.yaml")
        change(content, content["download"]["inputs"])
        rebuild_factory.dump(folder / "params.yaml", content)
        rehash_everything(folder)

    return attack


HUB = "hf://datasets/owner/name@" + "1" * 40


def selected(change):
    """A recipe of selected images, whose tars have holes; inputs.json as its download writes it, changed."""

    def attack(folder):
        def recipe(content, listed):
            content["download"]["images"] = "selected"
            listed["tars"] = [{"url": f"{HUB}/data-0004.tar", "bytes": 512, "sha256": "8" * 64}]
            listed["index"] = [{"url": f"{HUB}/data-0004.json", "bytes": 7, "sha256": "9" * 64}]

        def found(content, listed):
            tar = {"path": "../mirror/data-0004.tar", "bytes": 512, "sha256": "8" * 64, "pinned": "members"}
            listed["tars"] = [tar | {"url": f"{HUB}/data-0004.tar", "members": 3}]
            index = {"path": "../mirror/data-0004.json", "bytes": 7, "sha256": "9" * 64, "pinned": "sha256"}
            listed["index"] = [index | {"url": f"{HUB}/data-0004.json"}]
            change(listed)

        parameters(recipe)(folder)
        inputs(found)(folder)

    return attack


def converted_database(_, listed):
    listed["database"] |= {"url": listed["database"]["url"] + "#danbooru2023.db", "pinned": "converted"}


def two_databases(_, listed):
    listed["database"] = [listed["database"], listed["database"] | {"url": "file://x#y", "pinned": "converted"}]


def span_of_tars(content, listed):
    listed["tars"] = [{"url": "file://mirror/data-{0004..0005}.tar", "bytes": None, "sha256": None}]


def recorded(number):
    def change(_, listed):
        entry = listed["tars"][0] | {"pinned": "recorded"}
        numbers = (4, number) if number else (4,)
        listed["tars"] = [entry | {"url": f"file://mirror/data-{each:04}.tar"} for each in numbers]

    return change


def span(number):
    """A span without a list, of the files 4 and 5, of which inputs.json has 4 and `number`."""

    def attack(folder):
        parameters(span_of_tars)(folder)
        inputs(recorded(number))(folder)

    return attack


def unpinned_index(folder):
    selected(lambda listed: listed.pop("index"))(folder)
    parameters(lambda _, listed: listed.pop("index"))(folder)


def other_address(url):
    """Of the database, in params.yaml and in inputs.json."""

    def attack(folder):
        parameters(lambda _, listed: listed["database"].update(url=url))(folder)
        input_value("database", url=url)(folder)

    return attack


without_revision = other_address("hf://datasets/owner/name/danbooru2023.db")
of_a_branch = other_address("hf://datasets/owner/name@main/danbooru2023.db")
OTHER = "has another size or sha256 than params.yaml pins"
PINS = {  # what → (forgery, words of lock/pins)
    "another database, called a tar with holes": (input_value("database", sha256="4" * 64, pinned="members"), OTHER),
    "another tar, called one with holes": (input_value("tars", sha256="4" * 64, pinned="members"), OTHER),
    "a whole tar, called one with holes": (input_value("tars", pinned="members"), "by params.yaml it is “sha256”"),
    "an input called recorded": (input_value("database", pinned="recorded"), "by params.yaml it is “sha256”"),
    "a prefix of a sha256": (inputs(lambda _, listed: listed["database"].update(sha256="4" * 10)), OTHER),
    "another size": (input_value("database", bytes=5), OTHER),
    "true as a size": (input_value("database", bytes=True), OTHER),
    "an entry of another name": (input_value("tars", name="database"), "or has other keys"),
    "another revision": (
        input_value("database", url=f"{HUB}/danbooru2023.db"), f"{HUB}/danbooru2023.db is in inputs.json and not"),
    "an input left out": (inputs(lambda _, listed: listed.pop("tars")), "is pinned and not in inputs.json"),
    "an input more": (inputs(lambda _, listed: listed.update(vae=listed["database"])), "is in inputs.json and not"),
    "an input twice": (
        inputs(lambda _, listed: listed["tars"].append(listed["tars"][0])), "lists the files of tars twice"),
    "a list for one file": (
        inputs(lambda _, listed: listed.update(database=[listed["database"]])), "lists the files of database twice"),
    "an empty list for one file": (inputs(lambda _, listed: listed.update(database=[])), "and not in inputs.json"),
    "a converted database": (inputs(converted_database), "#danbooru2023.db is in inputs.json and not pinned"),
    "a second database": (inputs(two_databases), "file://x#y is in inputs.json and not pinned"),
    "another start": (inputs(lambda content, _: content.update(start="published")), "has another start"),
    "a key more": (inputs(lambda content, _: content.update(note="verified")), "has another start"),
    "a file of a span left out": (span(None), "data-0005.tar is pinned and not in inputs.json"),
    "a file outside of a span": (span(6), "data-0006.tar is in inputs.json and not pinned"),
    "no index of tars with holes": (selected(lambda listed: listed.pop("index")), "data-0004.json is pinned and not"),
    "no pin of an index of tars with holes": (unpinned_index, "does not pin database or posts, tars, and their index"),
    "a file of a hub without a revision": (without_revision, "names no revision"),
    "a file of a branch": (of_a_branch, "is not a commit id"),
    "a tar with holes of another size": (selected(lambda listed: listed["tars"][0].update(bytes=5)), OTHER),
    "a tar with holes of another sha256": (selected(lambda listed: listed["tars"][0].update(sha256="4" * 64)), OTHER),
    "an index called a tar with holes":
        (selected(lambda listed: listed["index"][0].update(pinned="members")), "by params.yaml it is “sha256”"),
}  # fmt: skip


@pytest.mark.ci
@pytest.mark.parametrize("what", [*LOCKS, *PINS])
def test_another_lock_other_code_and_other_inputs_are_found(copy, what):
    change, check, words = LOCKS.get(what) or (PINS[what][0], "lock/pins", PINS[what][1])
    change(copy)
    status, message = found_by(check, copy)
    assert status == "FAIL" and words in message


def test_what_the_pins_leave_open_is_no_forgery(copy):
    selected(lambda listed: None)(copy)
    status, message = found_by("lock/pins", copy)
    assert status == "PASS" and message.endswith("of them by a whole sha256")


def test_a_span_without_a_list_is_every_file_of_it(copy):
    span(5)(copy)
    assert found_by("lock/pins", copy)[1].endswith("2 others as the first download recorded them")


def test_an_unfinished_rebuild_cannot_be_judged(copy):
    locked(copy, lambda stages: stages.pop("milestones"))
    for path in ("milestones.csv", "milestones.png"):
        (copy / "build" / path).unlink()
    rebuild_factory.records(copy)
    code, output = ask("audit", copy)
    assert code == 2 and "not finished: dvc.lock has no stage milestones" in output, output
    (copy / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    shutil.rmtree(copy / "build")
    code, output = ask("audit", copy)
    passed = [line for line in output.splitlines() if line.startswith("PASS")]
    assert code != 0 and [line.split()[1] for line in passed] == ["fidelity/quirks"], output


def left_out(name, size=None):
    def attack(folder):
        path, manifest = folder / "build" / name, json.loads((folder / "bundle.json").read_text())
        if path.exists():
            manifest["left_out"][f"build/{name}"] = rebuild_factory.hashed(path)["size"]
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        manifest["left_out"][f"build/{name}"] = size or manifest["left_out"][f"build/{name}"]
        (folder / "bundle.json").write_text(json.dumps(manifest))

    return attack


def file_of_no_stage(folder):
    (folder / "build" / "kohaku-xl-delta.json").write_text("{}")


BUNDLES = {
    "a table left out": (left_out("captions.parquet"), "lock/outs", "captions.parquet (of caption) is not in the bun"),
    "the journal left out": (left_out("journal.parquet"), "lock/outs", "journal.parquet (of train) is not in the bund"),
    "the list of inputs left out": (left_out("inputs.json"), "lock/outs", "inputs.json (of download) is not in the b"),
    "a description of code left out": (left_out("code/train.json"), "lock/outs", "code/train.json (of code) is not in"),
    "pictures left out": (left_out("samples"), "lock/outs", "build/samples (of preview) is not in the bundle"),
    "weights of another size":
        (left_out("delta-base.safetensors", 5), "lock/outs", "delta-base.safetensors (of merge) has another size in"),
    "weights of no stage": (left_out("other.safetensors", 5), "lock/outs", "leaves out build/other.safetensors"),
    "a file of no stage": (file_of_no_stage, "lock/bundle", "build/kohaku-xl-delta.json is not an output of any stage"),
}  # fmt: skip


@pytest.mark.parametrize("what", BUNDLES)
def test_a_bundle_leaves_out_weights_only_and_holds_nothing_else(bundle, tmp_path, what):
    change, check, words = BUNDLES[what]
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    change(folder)
    sealed(folder)
    status, message = found_by(check, folder)
    assert status == "FAIL" and words in message
