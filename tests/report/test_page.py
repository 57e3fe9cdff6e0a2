"""The page of a build loads nothing, escapes everything, claims nothing that was not checked, and is deterministic."""

import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner

import build_factory
from kohaku_delta.cli.main import main

EVIL = """<script>alert("1")</script>'"><img src=x onerror=alert(2)>&amp;{{ 7*7 }}"""
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """(tag, attributes, text inside) of each element, in order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, attributes)
        self.elements.append([tag, dict(attributes), ""])
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, *tags) -> list:
        return [(attributes, text) for tag, attributes, text in self.elements if tag in tags]


def run(command: str, place, *options):
    return CliRunner().invoke(main, [command, str(place), *map(str, options)])


def written(place) -> str:
    done = run("report", place)
    assert done.exit_code == 0, done.output
    return (place / "build" / "report.html").read_text(encoding="utf-8")


def badges(page: str) -> dict[str, tuple[str, str]]:
    """name → (kind, the whole text of the badge)."""
    found = {}
    for attributes, text in Page(page).all("li"):
        if "badge" in attributes.get("class", "").split():
            found[re.search(r"(\w+):", text)[1]] = (attributes["class"].split()[1], " ".join(text.split()))
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return written(build_factory.make(tmp_path_factory.mktemp("recipe")))


def test_a_build_gives_the_same_page_in_any_folder_and_time_zone(tmp_path, page, monkeypatch):
    place = build_factory.make(tmp_path / "elsewhere" / "other name")
    for path in sorted((place / "build").rglob("*.png"), reverse=True):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    assert written(place) == page
    assert written(place) == page, "the page itself changes nothing"
    assert str(tmp_path) not in page


def test_the_page_refers_to_no_other_file_and_runs_nothing(page):
    parsed = Page(page)
    assert not parsed.open and page.startswith("<!doctype html>")
    ids = [attributes["id"] for _, attributes, _ in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes, _ in parsed.elements:
        assert tag not in (
            "script",
            "iframe",
            "object",
            "embed",
            "form",
            "base",
            "audio",
            "video",
            "use",
            "foreignobject",
        )
        assert not [
            name
            for name in attributes
            if name.startswith("on")
            or name in ("style", "srcset", "action", "formaction", "ping", "background", "poster", "xlink:href")
        ]
        link = attributes.get("href", attributes.get("src"))
        if link is not None and not link.startswith("data:"):
            assert tag == "a" and link[0] == "#" and link[1:] in ids
        assert tag != "meta" or attributes.get("http-equiv", "Content-Security-Policy") == "Content-Security-Policy"
    [(_, style)] = parsed.all("style")
    assert "url(" not in style and "@import" not in style and "@font-face" not in style


def test_the_content_security_policy_allows_data_images_and_the_one_style(page):
    policy = next(attributes["content"] for attributes, _ in Page(page).all("meta") if "http-equiv" in attributes)
    style = page[page.index("<style>") + len("<style>") : page.index("</style>")]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert (
        policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def test_hostile_texts_are_escaped(tmp_path):
    params = build_factory.recipe()
    params["bake"].update(title=EVIL, license=EVIL)
    params["preview"]["prompts"][0] = f"```\n{EVIL}"
    params["caption"]["years"]["2010"] = f"| {EVIL}\n# [a](javascript:alert(3)) ![b](https://evil.example/c)"
    params["download"]["inputs"]["tars"][0]["url"] = f"file://{EVIL}"
    dataset = build_factory.DATASET | {"dropped": {EVIL: 1}, "ratings": {EVIL: 9}}
    place = build_factory.make(tmp_path, params, dataset)
    digest = hashlib.sha256((place / "dvc.lock").read_bytes()).hexdigest()
    audit = {"lock": digest, "findings": [{"group": "lock", "name": "code", "status": "FAIL", "said": EVIL}]}
    (place / "build" / "audit.json").write_text(json.dumps(audit))
    build_factory.record(place, "select", processor=EVIL, container=EVIL)
    text = written(place)
    parsed = Page(text)
    assert not parsed.all("script", "iframe", "b") and all(
        attributes["src"].startswith("data:image/") for attributes, _ in parsed.all("img")
    )
    assert all(attributes["href"][0] == "#" for attributes, _ in parsed.all("a"))
    [(_, title)] = parsed.all("title")
    assert title == f"{EVIL}: report of a build"
    [(_, article)] = parsed.all("article")
    for shown in (EVIL, "[a](javascript:alert(3)) ![b](https://evil.example/c)"):
        assert shown in " ".join(article.split()).replace("\n", " ")
    cells = [body for _, body in parsed.all("td", "th")]
    assert sum(cell == EVIL for cell in cells) >= 3  # what the audit said, the container, the processor
    assert any(attributes["alt"].count(EVIL) for attributes, _ in parsed.all("img"))


def test_images_have_alternative_texts_and_tables_have_headings(page):
    parsed = Page(page)
    assert dict(parsed.all("html")[0][0]) == {"lang": "en"} and "width=device-width" in page
    pictures = parsed.all("img")
    assert len(pictures) == 1 + len(build_factory.PICTURES) + 1 + 4 + 1, "preview, plots, pipeline, curves, milestones"
    assert all(
        len(attributes["alt"]) > 20 and int(attributes["width"]) and int(attributes["height"])
        for attributes, _ in pictures
    )
    tables = re.findall(r"<table.*?</table>", page.partition("<article")[0], re.DOTALL)
    assert len(tables) >= 4
    for table in tables:
        inner = Page(table)
        assert inner.all("caption")[0][1].strip() and all(
            attributes["scope"] in ("col", "row") for attributes, _ in inner.all("th")
        )
        rows = [Page(row) for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)]
        assert len({len(row.all("th", "td")) for row in rows}) == 1
    levels = [int(tag[1]) for tag, _, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert (
        levels[0] == 1
        and levels.count(1) == 1
        and all(after <= before + 1 for before, after in itertools.pairwise(levels))
    )


def luminance(colour: str) -> float:
    """Relative, as WCAG 2.2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_texts_have_enough_contrast_in_both_colour_schemes(page):
    style = Page(page).all("style")[0][1]
    schemes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]
    assert len(schemes) == 2 and schemes[0].keys() == schemes[1].keys()
    for scheme in schemes:
        pairs = [
            (text, ground)
            for text in ("ink", "quiet", "accent", "good", "bad", "open")
            for ground in ("paper", "panel")
        ]
        for text, ground in [
            *pairs,
            ("good", "good-soft"),
            ("bad", "bad-soft"),
            ("open", "open-soft"),
            ("ink", "soft"),
            ("ink", "open-soft"),
        ]:
            low, high = sorted((luminance(scheme[text]), luminance(scheme[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_every_hash_of_the_lock_and_of_the_weights_is_on_the_page(tmp_path):
    place = build_factory.make(tmp_path)
    text = written(place)
    for path in re.findall(r"md5: ([0-9a-f]{32}\S*)", (place / "dvc.lock").read_text()):
        assert f">{path}</code>" in text
    for name in ("delta-base", "delta-lokr", "kohaku-xl-delta"):
        assert hashlib.sha256((place / "build" / f"{name}.safetensors").read_bytes()).hexdigest() in text
    for entry in json.loads((place / "build" / "inputs.json").read_text())["inputs"].values():
        assert all(each["sha256"] in text for each in (entry if isinstance(entry, list) else [entry]))


@pytest.mark.ci
def test_an_audit_counts_only_for_the_lock_that_it_checked(tmp_path):
    place = build_factory.make(tmp_path)
    kind, text_of_badge = badges(written(place))["Audit"]
    assert kind == "open" and "not audited" in text_of_badge
    digest = hashlib.sha256((place / "dvc.lock").read_bytes()).hexdigest()
    checks = {
        "lock": ("PASS", "outs re-hashed"),
        "release": ("SKIP", "not the release"),
        "chain": ("FAIL", "the journal breaks at row 3"),
    }

    def audited(lock, *names):
        found = [{"group": "g", "name": name, "status": checks[name][0], "said": checks[name][1]} for name in names]
        (place / "build" / "audit.json").write_text(
            json.dumps({"lock": lock, "findings": found, "exit": 0, "verdict": "PASS"})
        )
        text = written(place)
        assert all((checks[name][1] in text) == (lock == digest) for name in names)
        return badges(text)["Audit"]

    assert audited(digest, "lock", "release")[0] == "good"
    kind, text_of_badge = audited(digest, "lock", "release", "chain")
    assert kind == "bad" and "1 passed, 1 failed, 1 skipped. g/chain: the journal breaks at row 3" in text_of_badge
    assert audited(digest, "release")[0] == "open"
    for other in ("0" * 64, None):
        kind, text_of_badge = audited(other, "lock")
        assert kind == "open" and "of another lock" in text_of_badge


def test_a_record_is_shown_only_of_the_outputs_that_it_wrote(tmp_path):
    place = build_factory.make(tmp_path)
    build_factory.record(place, "select", seconds=7265.0, processor="processor a", dirty=True)
    build_factory.record(place, "filter", seconds=3.0, processor="processor b", md5="f" * 32)
    text = written(place)
    assert "2 h 1 min" in text and "processor a" in text and "abababababab, changed" in text
    assert "processor b" not in text


def test_the_fidelity_table_has_the_documents_rows_and_the_values_of_this_build(tmp_path):
    rows = [
        line.split(" | ")
        for line in (build_factory.ROOT / "docs" / "fidelity.md").read_text().split("## ")[0].splitlines()
        if line.startswith("| ")
    ][1:]
    params = build_factory.recipe()
    params["caption"]["no_quality_above_id"] = None
    text = written(build_factory.make(tmp_path / "a", params)).partition('id="fidelity"')[2].partition("</table>")[0]
    assert text.count("<tr") == len(rows) + 1
    assert "<code>caption.no_quality_above_id: null</code>" in text and "<code>train.warmup_steps: 4</code>" in text
    assert sum(row[2].startswith("`") for row in rows) == len(re.findall("<code>[a-z]+[.][a-z_]+: ", text))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "fidelity.md").write_text(
        "| the release | this recipe | key |\n|---|---|---|\n"
        f"| {EVIL} | [a](https://evil.example) ![b](https://evil.example/c) | `train.x` |\n"
    )
    parsed = Page(written(build_factory.make(tmp_path / "b", params | {"root": str(tmp_path)})))
    assert any(cell == EVIL.replace("&amp;", "&") for _, cell in parsed.all("th")) and not parsed.all("script")
    assert all(attributes["src"].startswith("data:image/") for attributes, _ in parsed.all("img"))
    assert all(attributes["href"][0] == "#" for attributes, _ in parsed.all("a"))
    (tmp_path / "docs" / "fidelity.md").write_text("nothing")
    done = run("report", tmp_path / "b")
    assert done.exit_code == 1 and "fidelity.md has no table" in done.output


def test_changes_and_losses_since_the_build_are_shown(tmp_path):
    place = build_factory.make(tmp_path)
    (place / "build" / "posts.parquet").write_bytes(b"longer than it was")
    (place / "build" / "bucket.txt").unlink()
    params = build_factory.recipe()
    params["train"]["seed"] = 7
    build_factory.write_params(place, params)
    listed = json.loads((place / "build" / "inputs.json").read_text())
    listed["inputs"]["gamma"]["sha256"] = "f" * 64
    (place / "build" / "inputs.json").write_text(json.dumps(listed))
    text = written(place)
    found = badges(text)
    assert found["Files"][0] == found["Recipe"][0] == found["Inputs"][0] == "bad"
    assert "build/posts.parquet: has 18 bytes" in found["Files"][1] and "build/bucket.txt: missing" in found["Files"][1]
    assert "train.seed" in found["Recipe"][1] and "gamma: differs from its pin" in found["Inputs"][1]
    assert "training 1337" in text and "training 7" not in text, "what is shown is what the stages ran with"


def test_the_page_and_the_card_have_the_held_out_loss_of_every_milestone(tmp_path):
    place = build_factory.make(tmp_path)
    text = written(place)
    (curve,) = [attributes["alt"] for attributes, _ in Page(text).all("img") if "Held-out loss" in attributes["alt"]]
    assert "over 3 models, steps 0 to 5" in curve and "starts at 0.5 and ends at 0.25" in curve
    assert run("card", place).exit_code == 0
    assert "by steps: base: 0.5000; 2: 0.3750; 5: 0.2500." in (place / "build" / "README.md").read_text()
    empty = "step,held_out_loss,held_out_loss_training\n0,,\n5,,\n"
    place = build_factory.make(tmp_path / "none", texts={"milestones.csv": empty})
    assert "Held-out loss over" not in written(place) and run("card", place).exit_code == 0
    assert "on the way" not in (place / "build" / "README.md").read_text()


def test_an_unfinished_build_has_a_page_and_no_card(tmp_path):
    place = build_factory.make(tmp_path)
    last = ("train", "bake", "export", "statistics", "preview", "milestones")
    build_factory.lock(place, build_factory.recipe(), leave_out=last)
    for name in (
        "curves.csv",
        "dataset.json",
        "preview.png",
        "held-out.json",
        "kohaku-xl-delta.safetensors",
        "delta-lokr.safetensors",
    ):
        (place / "build" / name).unlink()
    text = written(place)
    kind, text_of_badge = badges(text)["Stages"]
    assert str(tmp_path) not in text and "build/ is not finished" in text
    assert kind == "bad" and "7 of 13" in text_of_badge and all(stage in text_of_badge for stage in last[:5])
    done = run("card", place)
    assert (
        done.exit_code == 1
        and "nothing of bake, statistics, train" in done.output
        and not (place / "build" / "README.md").exists()
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("dvc.lock", "stages: [", "dvc.lock is not YAML"),
        (
            "dvc.lock",
            "schema: '2.0'\nstages: {train: {cmd: x, outs: [{path: x, hash: md5, md5: zz, size: 1}]}}",
            "stages.train.outs.0.md5",
        ),
        (
            "dvc.lock",
            "schema: '2.0'\nstages: {train: {cmd: x, outs: [{path: ../x, hash: md5, md5: " + "a" * 32 + ", size: 1}]}}",
            "outside the recipe's folder",
        ),
        (
            "dvc.lock",
            "schema: '2.0'\nstages: {train: {cmd: x, params: {params.yaml: {train: {seed: often}}}}}",
            "train.seed",
        ),
        ("dvc.yaml", "stages: 5", "dvc.yaml: stages is 5"),
        ("build/dataset.json", "{", "dataset.json: it is not JSON"),
        ("build/dataset.json", json.dumps(build_factory.DATASET | {"steps": "many"}), "steps is 'many'"),
        ("build/dataset.json", "[" * 100_000, "dataset.json"),
        ("build/held-out.json", '{"posts": -1}', "held-out.json"),
        ("build/held-out.json", '{"posts": 3, "reason": "none"}', "held-out.json"),
        ("build/held-out.json", '{"posts": 0}', "held-out.json"),
        ("build/inputs.json", '{"inputs": {"a": {"url": "x", "bytes": 1, "sha256": "no"}}}', "inputs.json"),
        ("build/curves.csv", "step,loss\n0,none\n", "curves.csv"),
        ("build/milestones.csv", "step,held_out_loss,held_out_loss_training\n0,low,low\n", "milestones.csv"),
        ("build/milestones.png", "GIF89a", "milestones.png is not a PNG"),
        ("build/bucket.txt", "bucket one\n", "bucket.txt"),
        ("build/preview.png", "GIF89a", "preview.png is not a PNG"),
        ("build/audit.json", '{"findings": []}', "audit.json: findings"),
        ("record", "null", "No stage writes such a record"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, name, content, words):
    place = build_factory.make(tmp_path)
    path = build_factory.record_path(place, "select") if name == "record" else place / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    done = run("report", place)
    assert done.exit_code == 1 and words in done.output and done.output.startswith("Error: "), done.output
    assert not (place / "build" / "report.html").exists()


def test_a_folder_without_a_recipe_is_refused(tmp_path):
    done = run("report", tmp_path)
    assert done.exit_code == 1 and "params.yaml does not exist. Name a recipe's folder" in done.output


def test_a_very_wide_picture_is_scaled_down_deterministically(tmp_path, page):
    place = build_factory.make(tmp_path)
    (place / "build" / "preview.png").write_bytes(build_factory.png(4800, 1200))
    text = written(place)
    [shown] = [attributes for attributes, _ in Page(text).all("img") if attributes["src"].startswith("data:image/webp")]
    assert (shown["width"], shown["height"]) == ("2400", "600")
    assert written(place) == text
