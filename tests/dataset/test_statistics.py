"""The report counts what is there, compares it with what was published, and draws the same bytes every time."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from kohaku_delta import params
from kohaku_delta.danbooru import tars
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import captions, dataset_statistics, filtering, published_counts, selection, tag_counts
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.params import PublishedDataset
from kohaku_delta.sdxl.tokenizer import ClipTokenizer
from kohaku_delta.training import schedule

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "data" / "tokenizer"


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """What select, filter, caption and schedule write for the miniature."""
    folder, recipe = tmp_path_factory.mktemp("build"), params.load("miniature/params.yaml")
    database = Database("data/danbooru2023.db")
    selected = selection.select(database, recipe.selection)
    posts, dropped = filtering.filter_posts(
        database, tars.tars_in("data/images"), selected["post_id"].to_numpy(), recipe.filter, recipe.caption
    )
    counts = tag_counts.TagCounter()
    for name, each in (("selection", selected), ("posts", posts), ("dropped", dropped)):
        parquet.write(each, folder / f"{name}.parquet")
    captions.write_captions(database, posts["post_id"].to_numpy(), recipe.caption, folder / "captions.parquet", counts)
    tag_counts.write_tag_counts(counts.artists(), folder / "artists-kxl-delta.json")
    tag_counts.write_tag_counts(counts.characters(), folder / "characters-kxl-delta.json")
    (folder / "bucket.txt").write_text(schedule.bucket_lines(schedule.build_schedule(posts, recipe.schedule)[1]))
    return folder


def report(build, out, *more, recipe="miniature/params.yaml"):
    names = (
        "selection.parquet",
        "posts.parquet",
        "dropped.parquet",
        "captions.parquet",
        "artists-kxl-delta.json",
        "characters-kxl-delta.json",
    )
    files = [part for name in names for part in (f"--{name.split('.')[0].split('-')[0]}", build / name)]
    given = [
        "--params",
        recipe,
        "--database",
        "data/danbooru2023.db",
        "--tokenizer",
        TOKENIZER,
        *files,
        "--buckets",
        build / "bucket.txt",
    ]
    given += ["--out", out / "dataset.json", "--pictures", out / "statistics", *more]
    place = sys.path[0]
    main = runpy.run_path(str(ROOT / "stages" / "statistics.py"))["main"]
    sys.path[0] = place
    return CliRunner().invoke(main, [str(each) for each in given])


def test_a_report_is_the_same_bytes_twice_and_its_counts_add_up(build, tmp_path):
    files = []
    for name in ("a", "b"):
        done = report(build, tmp_path / name)
        assert done.exit_code == 0, done.output
        assert "not compared" in done.stdout and done.stdout.startswith("statistics: ")
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()})
    assert files[0] == files[1]
    assert sorted(files[0]) == [
        "buckets.png",
        "dataset.json",
        "names.png",
        "posts.png",
        "ratings.png",
        "tokens.png",
        "years.png",
    ]
    figures = json.loads(files[0]["dataset.json"])
    assert figures["selected"] == figures["trained"] + sum(figures["dropped"].values())
    assert figures["trained"] == sum(figures["ratings"].values()) == sum(figures["quality"].values())


def test_published_figures_are_compared_and_never_forced(build, tmp_path):
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text)
    done = report(build, tmp_path, recipe=tmp_path / "params.yaml")
    assert done.exit_code == 0, done.output
    trained = parquet.read(build / "posts.parquet").num_rows
    assert (
        f"published 3,665,398 posts (here {trained - 3665398:+,})" in done.stdout
        and "of 33 known buckets equal" in done.stdout
    )
    comparison = json.loads((tmp_path / "dataset.json").read_text())["published"]
    assert comparison["posts"] == {"published": 3665398, "rebuilt": trained, "difference": trained - 3665398}


def test_a_bucket_counts_as_equal_only_with_the_same_number_of_images():
    figures = {"trained": 10, "steps": 3, "buckets": [[64, 64, 4], [64, 96, 5], [96, 64, 1]]}
    comparison = published_counts.compare_counts(
        figures, PublishedDataset(posts=10, steps=4, buckets=[[64, 64, 4], [64, 96, 6], [32, 32, 1]])
    )
    assert comparison["buckets"] == {"published": 3, "equal": 1}
    assert (
        published_counts.comparison_sentence(comparison)
        == "published 10 posts (here +0), 4 steps (here -1), 1 of 3 known buckets equal"
    )


def test_lengths_in_tokens_are_those_of_whole_captions(build):
    recipe = params.load("params.yaml")
    made = ClipTokenizer(TOKENIZER / "vocab.json", TOKENIZER / "merges.txt")
    counted = dataset_statistics.tag_and_token_counts(
        build / "captions.parquet", Database("data/danbooru2023.db"), recipe.caption, made
    )
    rows = parquet.read(build / "captions.parquet", ["keep", "general"]).to_pylist()
    whole = [len(made.encode(", ".join(row["keep"] + row["general"]))) for row in rows]
    assert counted["tokens"] == np.bincount(whole).tolist()
    assert dict(counted["general"])["solo"] == sum("solo" in row["general"] for row in rows)
    assert not {"safe", "newest", "masterpiece", "highres"} & dict(counted["general"]).keys()


def test_a_caption_that_cleaning_changes_is_measured_whole(tmp_path):
    """`&lt;` is an entity unless the text has a `<` anywhere: a word alone does not tell."""
    made = ClipTokenizer(TOKENIZER / "vocab.json", TOKENIZER / "merges.txt")
    rows = [
        {"keep": ["ﬁsh &lt;3"], "general": ["solo", "a <b"]},
        {"keep": [], "general": ["ｆｕｌｌ", "smile"]},
        {"keep": ["x"], "general": ["&amp;"]},
    ]
    parquet.write(pa.Table.from_pylist(rows), tmp_path / "captions.parquet")
    counted = dataset_statistics.tag_and_token_counts(
        tmp_path / "captions.parquet", Database("data/danbooru2023.db"), params.load("params.yaml").caption, made
    )
    assert (
        counted["tokens"]
        == np.bincount([len(made.encode(", ".join(row["keep"] + row["general"]))) for row in rows]).tolist()
    )


def test_files_of_different_runs_are_refused(build, tmp_path):
    parquet.write(parquet.read(build / "posts.parquet").slice(1), tmp_path / "posts.parquet")
    with pytest.raises(UserError, match="They are of different runs"):
        dataset_statistics.filter_counts(
            build / "selection.parquet", tmp_path / "posts.parquet", build / "dropped.parquet"
        )
    (tmp_path / "bucket.txt").write_text("bucket 0: resolution (64, 64), count: 3\nbucket one\n")
    with pytest.raises(UserError, match="bucket one.*Run the schedule stage again"):
        dataset_statistics.bucket_counts(tmp_path / "bucket.txt", params.load("params.yaml").schedule)


def test_a_dataset_of_nothing_but_odd_posts_is_drawn(tmp_path):
    from kohaku_delta.report import dataset_plots

    recipe = params.load("params.yaml")
    figures = {
        "selected": 1, "trained": 0, "dropped": {}, "despite": {}, "ratings": [[0] * 8] * 5, "years": {0: 1, 9999: 2},
        "buckets": [], "micro_batches": 0, "steps": 0,
        "artists": [], "characters": [("$a_$ 初音" * 20, 1)], "general": [], "tokens": [1],
    }  # fmt: skip
    assert len(dataset_plots.draw_plots(figures, recipe.caption, 225, recipe.published.dataset, tmp_path)) == 6


def test_the_report_does_not_load_torch():
    code = (
        "import runpy, sys; sys.argv = ['x']; runpy.run_path('stages/statistics.py'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_parquet_file_of_captions_reads_as_plain_texts(build):
    assert parquet.read(build / "captions.parquet").schema.types == [
        pa.int64(),
        pa.list_(pa.field("element", pa.string())),
        pa.list_(pa.field("element", pa.string())),
        pa.string(),
    ]


def test_a_font_list_in_the_home_directory_decides_nothing(tmp_path):
    """matplotlib keeps a list of fonts in the user's cache; here it says that a serif face is DejaVu Sans."""
    script = (
        "import sys; sys.path[0] = 'src'; from kohaku_delta.report import plotting; "
        "print(plotting.font_manager.findfont('DejaVu Sans'))"
    )

    def found():
        environment = os.environ | {"MPLCONFIGDIR": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
        ).stdout

    honest = found()
    (kept,) = tmp_path.glob("fontlist*.json")
    text = kept.read_text()
    assert "DejaVuSans.ttf" in text
    kept.write_text(text.replace("DejaVuSans.ttf", "DejaVuSerif.ttf"))
    assert found() == honest
