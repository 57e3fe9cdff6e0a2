"""Every output is bound to what it was made of: whichever is changed, with dvc.lock and all records made consistent
afterwards, is found by the check that makes it again, or named in the line of outputs that no check looked at.
"""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from kohaku_delta.formats import safetensors_io
from kohaku_delta.provenance.artifact import open_artifact
from kohaku_delta.verify import audit as audits
from kohaku_delta.verify import (
    check_chain,
    check_lock_inputs,
    check_lock_records,
    check_outputs,
    check_preview,
    findings,
)
from tampering import ask, audit, failed, other_code, record_edited, rehash_everything, rows, ulp


def replaced(name, old, new):
    """An attack that replaces a text in a file of build/, once."""

    def attack(folder):
        path = folder / "build" / name
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new, 1))

    return attack


def pixel(name, x, y):
    """One colour of one pixel, by the lowest bit."""

    def attack(folder):
        path = folder / "build" / name
        with Image.open(path) as image:
            pixels = np.asarray(image).copy()
        pixels[y, x] ^= 1
        Image.fromarray(pixels).save(path)

    return attack


def other_title(folder):
    """The final model's header says what the recipe does not."""
    path = folder / "build" / "kohaku-xl-delta.safetensors"
    with safetensors_io.open_file(path) as file:
        metadata = dict(file.metadata)
    safetensors_io.save(path, load_file(path), metadata | {"modelspec.author": "somebody else"})


def added(folder):
    (folder / "build" / "diffusers" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")


def drawn_twice(folder):
    rows(folder, "selection", lambda listed: listed[2].update(drawn=2))


def other_reason(folder):
    rows(folder, "dropped", lambda listed: listed[0].update(reason="hidden"))


def other_word(folder):
    def change(listed):
        listed[3]["general"].append("night sky")
        listed[3]["caption"] += ", night sky"

    rows(folder, "captions", change)


def first_number(name):
    """An attack that adds one to the first number of a text."""

    def attack(folder):
        path = folder / "build" / name
        content = path.read_text()
        place = next(place for place, letter in enumerate(content) if letter.isdigit() and content[place - 1] == " ")
        path.write_text(content[:place] + str((int(content[place]) + 1) % 9 + 1) + content[place + 1 :])

    return attack


def edited_card(folder):
    code, message = ask("card", folder)
    assert code == 0, message
    with open_artifact(folder) as rebuild:
        assert check_outputs.check_card(rebuild).status == "PASS"
    replaced("README.md", "## How to check it", "## Do not check it")(folder)


def test_a_card_of_an_earlier_build_is_no_false_alarm(copy):
    (copy / "build" / "README.md").write_text("# The card of another model\n")
    with open_artifact(copy) as rebuild:
        finding = check_outputs.check_card(rebuild)
    assert finding.status == "SKIP" and "is of an earlier or another build" in finding.message


def journal_of(rebuild):
    return check_chain.check_journal(rebuild)[1]


CHECKS = {
    "chain/selection": lambda rebuild: check_outputs.check_selection(rebuild, None),
    "chain/captions": lambda rebuild: check_outputs.check_captions(rebuild, None),
    "chain/statistics": lambda rebuild: check_outputs.check_statistics(rebuild, None),
    "chain/order": check_chain.check_order,
    "chain/curves": lambda rebuild: check_outputs.check_curves(rebuild, journal_of(rebuild)),
    "chain/final": check_outputs.check_final,
    "chain/diffusers": check_outputs.check_diffusers,
    "chain/preview": lambda rebuild: check_preview.check_sheet(rebuild, None),
    "chain/progress": lambda rebuild: check_preview.check_progress(rebuild, journal_of(rebuild)),
    "chain/card": check_outputs.check_card,
}
UNET, CONFIG = "diffusers/unet/diffusion_pytorch_model.safetensors", "diffusers/vae/config.json"
ATTACKS = {
    "a tensor of diffusers/ changed by an ulp": (ulp(UNET), "chain/diffusers", f"build/{UNET} is not what"),
    "another scaling factor in diffusers/":
        (replaced(CONFIG, "0.13025", "0.18215"), "chain/diffusers", f"build/{CONFIG} is not what"),
    "another scheduler in diffusers/":
        (replaced("diffusers/scheduler/scheduler_config.json", "epsilon", "v_prediction"), "chain/diffusers",
         "scheduler_config.json is not"),
    "another class named in diffusers/":
        (replaced("diffusers/model_index.json", "CLIPTextModel", "Other"), "chain/diffusers",
         "model_index.json is not"),
    "another padding token in diffusers/":
        (replaced("diffusers/tokenizer_2/special_tokens_map.json", '"!"', '"?"'), "chain/diffusers",
         "special_tokens_map.json is not"),
    "another merge in diffusers/":
        (replaced("diffusers/tokenizer/merges.txt", "\n", "\nq q\n"), "chain/diffusers",
         "merges.txt is not the input tokenizer_merges"),
    "a file added to diffusers/": (added, "chain/diffusers", "pytorch_model.bin is not a file that export writes"),
    "the final model changed by an ulp":
        (ulp("kohaku-xl-delta.safetensors"), "chain/final", "is not base + LoKr: 1"),
    "the final model's header":
        (other_title, "chain/final", "another header than bake writes"),
    "curves.csv": (replaced("curves.csv", "1,0.5", "1,0.4"), "chain/curves", "curves.csv is not what the journal"),
    "dataset.json": (first_number("dataset.json"), "chain/statistics", "build/dataset.json is not"),
    "a plot": (pixel("statistics/years.png", 5, 5), "chain/statistics", "build/statistics is not what it was made of "
               "gives: years.png"),
    "why a post was dropped": (other_reason, "chain/statistics", "build/dataset.json is not"),
    "the artists' list": (first_number("artists-kxl-delta.json"), "chain/captions", "build/artists-kxl-delta.json is"),
    "the characters' list":
        (first_number("characters-kxl-delta.json"), "chain/captions", "build/characters-kxl-delta.json is"),
    "a word of a caption": (other_word, "chain/captions", "build/captions.parquet is not"),
    "how often a post was drawn": (drawn_twice, "chain/selection", "build/selection.parquet is not"),
    "bucket.txt": (replaced("bucket.txt", "count: 1", "count: 2"), "chain/order", "bucket.txt is not what"),
    "the held-out loss of the final model":
        (replaced("held-out.json", '"sdxl": 0.25', '"sdxl": 0.2'), "chain/preview", "preview.png is not the sheet"),
    "the same, and milestones.csv not with it":
        (replaced("held-out.json", '"sdxl": 0.25', '"sdxl": 0.2'), "chain/progress", "another loss"),
    "the title of preview.png": (pixel("preview.png", 20, 8), "chain/preview", "preview.png is not the sheet"),
    "the title of milestones.png": (pixel("milestones.png", 20, 8), "chain/progress", "milestones.png is not the"),
    "a row of milestones.csv":
        (replaced("milestones.csv", "8,0.25,0.125\n", "8,0.25,0.125\n9,0.25,0.125\n"), "chain/progress", "rows"),
    "the model card":
        (edited_card, "chain/card", "README.md names this build's final model, and was changed"),
}  # fmt: skip


@pytest.mark.ci
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_changed_output_is_found_by_making_it_again(copy, attack):
    change, check, message = ATTACKS[attack]
    change(copy)
    with open_artifact(copy) as rebuild:
        finding = CHECKS[check](rebuild)
    assert (finding.status, f"{finding.group}/{finding.name}") == ("FAIL", check) and message in finding.message, (
        finding
    )


def test_what_was_hashed_anew_everywhere_is_found_by_its_contents_alone(copy):
    for name in ("another scaling factor in diffusers/", "curves.csv", "dataset.json", "the artists' list",
                 "the final model's header", "the title of preview.png", "a row of milestones.csv"):  # fmt: skip
        ATTACKS[name][0](copy)
    rehash_everything(copy)
    code, found = audit(copy)
    assert code == 1 and {name for name in failed(found) if name.startswith("lock/")} == set()
    assert failed(found).keys() >= {
        "chain/diffusers", "chain/curves", "chain/statistics", "chain/captions", "chain/final", "chain/preview",
        "chain/progress",
    }  # fmt: skip


def test_every_output_is_looked_at_or_named_with_what_would_look_at_it(copy):
    with open_artifact(copy) as rebuild:
        made = list(audits.audit(rebuild))
        described = audits.describe_unseen(rebuild, made)
        unseen = findings.not_looked_at(made, rebuild.writers)
        assert set(unseen) == {
            "build/posts.parquet", "build/dropped.parquet", "build/delta-base.safetensors", "build/journal.parquet",
            "build/samples", "build/held-out.json", "build/milestones.csv", "build/milestones.png",
        }  # fmt: skip
        assert all(out in described for out in unseen)
        assert "build/delta-base.safetensors" in described.split("(--stages)")[0]
        assert "build/journal.parquet (replay/steps was not made; --replay)" in described
        stage = rebuild.stages["select"]  # an output that a later version adds to dvc.yaml
        rebuild.stages["later"] = dataclasses.replace(stage, name="later", outs=("build/new.json",))
        del rebuild.__dict__["writers"]
        assert "build/new.json (no option looks at it)" in audits.describe_unseen(rebuild, made)


def revised(**revisions):
    """Attacks on the commits in records: stage → (commit, dirty)."""

    def attack(folder):
        for path in (folder / "build" / "records").iterdir():
            content = json.loads(path.read_text())
            commit, dirty = revisions.get(content["stage"], ("a" * 40, False))
            path.write_text(json.dumps(content | {"revision": {"commit": commit, "dirty": dirty}}))

    return attack


def loaded(**changed):
    return record_edited("select", lambda content: content["loaded"].update(changed))


def code_check(rebuild):
    return check_lock_records.check_revision(rebuild, check_lock_inputs.check_code(rebuild))


RECORD_CHECKS = {
    "lock/libraries": check_lock_inputs.check_libraries,
    "lock/loaded": check_lock_inputs.check_loaded,
    "lock/sandbox": check_lock_records.check_confinement,
    "lock/revision": code_check,
}
RECORD_ATTACKS = {
    "no libraries": (record_edited("train", lambda content: content.update(libraries={})), "lock/libraries", "FAIL",
                     "the record of train does not say which"),
    "a library that was not installed":
        (record_edited("train", lambda content: content["libraries"].update(torch="")), "lock/libraries", "FAIL",
         "does not say which torch was installed"),
    "nothing confined it": (record_edited("merge", lambda content: content.update(confined=None)), "lock/sandbox",
                            "FAIL", "merge was not confined: its record says nothing"),
    "it was not started as a stage":
        (record_edited("merge", lambda content: content.update(confined="nothing: it was not started as a stage")),
         "lock/sandbox", "FAIL", "merge was not confined: nothing"),
    "a kernel without Landlock":
        (record_edited("merge", lambda content: content.update(confined="audit hook alone: the kernel has none")),
         "lock/sandbox", "PASS", "merge: audit hook alone"),
    "no numerics": (record_edited("train", lambda content: content.update(numerics=None)), "lock/sandbox", "FAIL",
                    "the record of train does not say what its numbers were computed with"),
    "numerics of another torch":
        (record_edited("train", lambda content: content["numerics"].update(torch="2.0.0")), "lock/sandbox", "FAIL",
         "computed with another torch than was installed"),
    "a library's file edited after its installation":
        (loaded(changed=["numpy: _core.py"]), "lock/loaded", "FAIL", "did not install: numpy: _core.py"),
    "a library's file and its list edited":
        (record_edited("select", lambda content: content["loaded"]["records"].update(pyarrow="1" * 64)), "lock/loaded",
         "FAIL", "select ran with other files of pyarrow than those of the locked wheel"),
    "no lists of files": (loaded(records={}), "lock/loaded", "FAIL", "has no list of the files of adbc-driver-manager"),
    "a library that is not locked":
        (loaded(others={"evil": "1.0"}), "lock/loaded", "FAIL", "loaded evil 1.0, which cpu.txt does not have"),
    "modules from PYTHONPATH": (loaded(foreign=["sitecustomize"], variables=["PYTHONPATH"]), "lock/loaded", "FAIL",
                                "modules that belong to no library: sitecustomize"),
    "PYTHONPATH, and nothing loaded by it": (loaded(variables=["PYTHONPATH"]), "lock/loaded", "PASS", "PYTHONPATH"),
    "LD_PRELOAD": (loaded(variables=["LD_PRELOAD"]), "lock/loaded", "FAIL", "was started with LD_PRELOAD"),
    "usercustomize": (loaded(startup=["usercustomize"]), "lock/loaded", "FAIL", "code of no library when select began"),
    "a .pth file": (loaded(startup=["x.pth"]), "lock/loaded", "FAIL", "code of no library when select began: x.pth"),
    "the sitecustomize of a distribution of Linux": (loaded(startup=["sitecustomize"]), "lock/loaded", "PASS", "sitec"),
    "not a word of what was loaded":
        (record_edited("select", lambda content: content.update(loaded=None)), "lock/loaded", "FAIL",
         "the record of select does not say what was loaded"),
    "a record of an earlier version":
        (record_edited("select", lambda content: content.update(loaded=None, format="kohaku-delta record 1")),
         "lock/loaded", "SKIP", "the records of select are of an earlier version"),
    "one commit": (revised(), "lock/revision", "PASS", "all 13 recorded stages ran at commit aaaaaaaaaa"),
    "two commits, with the code at hand":
        (revised(train=("b" * 40, False)), "lock/revision", "PASS", "2 commits (aaaaaaaaaa, bbbbbbbbbb); the files"),
    "files that were not committed, with the code at hand":
        (revised(train=("a" * 40, True)), "lock/revision", "PASS", "train with files that were not committed; the"),
    "two commits, and other code": (lambda folder: (other_code(folder), revised(train=("b" * 40, False))(folder)),
                                    "lock/revision", "FAIL", "the code is not that at hand"),
}  # fmt: skip


@pytest.mark.parametrize("attack", RECORD_ATTACKS)
def test_a_record_that_is_not_strict_fails_its_line(copy, attack):
    change, check, status, message = RECORD_ATTACKS[attack]
    change(copy)
    with open_artifact(copy) as rebuild:
        finding = RECORD_CHECKS[check](rebuild)
    assert (finding.status, f"{finding.group}/{finding.name}") == (status, check) and message in finding.message, (
        finding
    )
