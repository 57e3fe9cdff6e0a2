"""What forgers do to a finished rebuild (rebuild_factory), and how tests run the commands on one.

A plain forger changes a file. A careful one calls `rehash_everything` afterwards: dvc.lock and the records are then
consistent, and only the contents give it away.
"""

import json
import shutil

import numpy as np
import pyarrow as pa
from click.testing import CliRunner
from safetensors.numpy import load_file

import rebuild_factory
from kohaku_delta.cli.main import main
from kohaku_delta.formats import parquet, safetensors_io
from kohaku_delta.training import journal


def ask(*arguments) -> tuple[int, str]:
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def audit(target, *arguments) -> tuple[int, dict[str, tuple[str, str]]]:
    """(exit code, {check: (status, sentence)})."""
    code, output = ask("audit", target, "--json", *arguments)
    content = json.loads(output)
    assert content["exit"] == code
    return code, {f"{each['group']}/{each['name']}": (each["status"], each["said"]) for each in content["findings"]}


def failed(found) -> dict[str, str]:
    return {name: message for name, (status, message) in found.items() if status == "FAIL"}


def locked(folder, change) -> None:
    """dvc.lock with its content changed."""
    content = rebuild_factory.loaded(folder / "dvc.lock")
    change(content["stages"])
    rebuild_factory.dump(folder / "dvc.lock", content)


def rehash_everything(folder) -> None:
    rebuild_factory.lock(folder)
    rebuild_factory.records(folder)


def sealed(folder) -> None:
    """bundle.json written anew: the careful forger of bundles."""
    content = json.loads((folder / "bundle.json").read_text())
    content["files"] = {
        path.relative_to(folder).as_posix(): rebuild_factory.sha256(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.name != "bundle.json"
    }
    (folder / "bundle.json").write_text(json.dumps(content))


def rows(folder, name, change) -> None:
    """A table with changed rows."""
    path = folder / "build" / f"{name}.parquet"
    before = parquet.read(path)
    listed = before.to_pylist()
    change(listed)
    parquet.write(pa.Table.from_pylist(listed, schema=before.schema), path)


def fabricate_output_hash(folder):
    locked(folder, lambda stages: stages["bake"]["outs"][0].update(md5="0" * 32))


def swapped(folder):
    one, other = folder / "build" / "selection.parquet", folder / "build" / "dropped.parquet"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second), other.write_bytes(first)


def swapped_in_the_lock(folder):
    swapped(folder)
    rebuild_factory.lock(folder)  # and not the records


def caption(folder):
    def change(listed):
        listed[3]["general"].append("night sky")
        listed[3]["caption"] += ", night sky"

    rows(folder, "captions", change)


def post(folder):
    rows(folder, "posts", lambda listed: listed.append(listed[-1] | {"post_id": listed[-1]["post_id"] + 1}))


def post_everywhere(folder):
    """The added post is selected and captioned too."""
    post(folder)
    rows(folder, "captions", lambda listed: listed.append(listed[-1] | {"post_id": listed[-1]["post_id"] + 1}))
    rows(folder, "selection", lambda listed: listed.append(listed[-1] | {"post_id": 9_999_999}))
    rows(folder, "posts", lambda listed: listed[-1].update(post_id=9_999_999))
    rows(folder, "captions", lambda listed: listed[-1].update(post_id=9_999_999))


def ulp(name):
    def attack(folder):
        path = folder / "build" / name
        tensors = {key: array.copy() for key, array in load_file(path).items()}
        array = tensors[sorted(tensors)[-1]].reshape(-1)
        array[:1].view(np.uint16)[0] ^= 1
        with safetensors_io.open_file(path) as file:
            metadata = dict(file.metadata)
        safetensors_io.save(path, tensors, metadata)

    return attack


MILESTONE = "milestones/delta-lokr-step00000004.safetensors"


def other_alpha(folder):
    path = folder / "build" / MILESTONE
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".alpha"))
    with safetensors_io.open_file(path) as file:
        metadata = dict(file.metadata)
    safetensors_io.save(path, tensors | {name: np.float16(1)}, metadata)


def later_milestone(folder):
    """The milestone of step 8 under the name of that of step 4."""
    path = folder / "build" / MILESTONE
    path.write_bytes(path.with_name(path.name.replace("4.", "8.")).read_bytes())


def other_picture(folder):
    """The trained model's picture under the base's name."""
    place = folder / "build" / "samples"
    (place / "base-01.png").write_bytes((place / "final-01.png").read_bytes())


def other_final_model(folder):
    """Another checkpoint, from which no sample was drawn."""
    path = folder / "build" / "kohaku-xl-delta.safetensors"
    safetensors_io.save(path, {name: tensor + np.float16(1) for name, tensor in load_file(path).items()})


def journaled(change, chained):
    """The journal with changed rows: as a text editor would leave it, or with a new chain between the honest beginning
    and end.
    """

    def attack(folder):
        path = folder / "build" / "journal.parquet"
        honest = journal.read_journal(path)
        listed = list(honest.rows)
        change(listed)
        if chained:
            forged = journal.Journal(honest.header, lokr=honest.lokr)
            for step, row in enumerate(listed):
                forged.append({key: value for key, value in row.items() if key != "chain"} | {"step": step})
            forged.write(path)
        else:
            journal.Journal(honest.header, listed, honest.lokr).write(path)

    return attack


def truncate_journal(listed):
    del listed[3]


def repeated(listed):
    listed.insert(3, listed[3])


def exchanged(listed):
    listed.insert(2, listed.pop(3))


def other_weights(listed):
    listed[-1].update(weights=1)


def other_norm(listed):
    listed[1].update(gradient_norm=9.0)


def losses_of_nan(listed):
    for row in listed[2:4]:
        row["losses"] = [float("nan")] * len(row["losses"])


def no_update(listed):
    listed[4].update(weights=listed[3]["weights"])


def record_edited(stage, change):
    """An attack that edits the record of a stage."""

    def attack(folder):
        path = next((folder / "build" / "records").glob(f"{stage}-*.json"))
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return attack


def record_of_another_run(content):
    """What another run of the schedule stage left, under this run's name."""
    content["outputs"]["build/schedule.parquet"].update(md5="1" * 32, sha256="1" * 64)


def code_changed_during_run(content):
    content["changed_code"] = ["src/kohaku_delta/training/training_loop.py"]


def param_changed_during_run(content):
    content["parameters"]["train"] |= {"seed": 7}


def other_code(folder):
    for path in (folder / "build" / "code").iterdir():
        content = json.loads(path.read_text())
        content["files"]["src/kohaku_delta/cli/stage_command.py"] = "3" * 64
        path.write_text(json.dumps(content))
    rehash_everything(folder)


def other_params(folder):
    path = folder / "params.yaml"
    path.write_text(path.read_text().replace("tag_dropout: 0.1", "tag_dropout: 0.2"))


def pin(folder):
    path = folder / "build" / "inputs.json"
    content = json.loads(path.read_text())
    content["inputs"]["database"]["sha256"] = "4" * 64
    path.write_text(json.dumps(content))


def start_added(folder):
    """A LoKr that the training is said to have begun with, pinned and verified."""
    path = folder / "mirror" / "start.safetensors"
    path.write_bytes(b"a LoKr")
    entry = rebuild_factory._pin(folder, path)
    content = rebuild_factory.loaded(folder / "params.yaml")
    content["download"]["inputs"]["network_weights"] = entry
    rebuild_factory.dump(folder / "params.yaml", content)
    listed = json.loads((folder / "build" / "inputs.json").read_text())
    listed["inputs"]["network_weights"] = rebuild_factory._listed(folder, entry)
    (folder / "build" / "inputs.json").write_text(json.dumps(listed, sort_keys=True))


def picture(folder):
    path = folder / "mirror" / "data-0004.tar"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def undeclared(folder):
    locked(folder, lambda stages: stages["caption"]["deps"].pop(0))


def other_command(folder):
    locked(folder, lambda stages: stages["merge"].update(cmd="python elsewhere.py"))


def stage_cut(folder):
    locked(folder, lambda stages: stages.pop("preview"))


def foreign_state(folder):
    """A state of another training in this one's folder."""
    place = next(folder.glob("work/*/step-00000004"))
    honest = journal.read_journal(place / "journal.parquet")
    other = journal.Journal(honest.header)
    for row in honest.rows:
        other.append({key: value for key, value in row.items() if key != "chain"} | {"scale": 2.0})
    shutil.rmtree(place / "journal.parquet")
    other.write_parts(place / "journal.parquet", 100)


def renamed_state(folder):
    (folder / "work" / "0123456789abcdef").mkdir()
    place = next(folder.glob("work/*/depends.json"))
    place.rename(folder / "work" / "0123456789abcdef" / "depends.json")
