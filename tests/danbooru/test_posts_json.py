"""posts.json of nyanko7/danbooru2023 becomes a database that gives the same selection, posts and captions."""

import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pyarrow.compute as pc
import pytest

import synthetic_danbooru
import synthetic_originals
from danbooru_factory import caption
from kohaku_delta import params
from kohaku_delta.danbooru import posts_json, schema, tars
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import captions, filtering, selection
from kohaku_delta.errors import UserError
from kohaku_delta.formats.hashing import hash_file
from kohaku_delta.preflight import estimates, host_checks, host_facts
from kohaku_delta.preflight.host_facts import Host

ROOT = Path(__file__).resolve().parents[2]
POST = {
    "id": 1, "created_at": "2019-06-03T11:20:00.000-04:00", "rating": "g", "fav_count": 5, "file_ext": "png",
    "is_deleted": False, "is_banned": False, "md5": "0" * 32, "file_url": "https://example.org/1.png",
    "tag_string": "a_bc solo", "tag_string_general": "a_bc solo", "tag_string_artist": "", "tag_string_character": "",
    "tag_string_copyright": "", "tag_string_meta": "", "pixiv_id": None, "media_asset": {"variants": [{"width": 1}]},
}  # fmt: skip


def write(path, *posts, end="\n"):
    """A posts.json; posts: changes of POST, or a line as it is."""
    lines = (each if isinstance(each, bytes) else json.dumps({**POST, **each}).encode() for each in posts)
    path.write_bytes(b"\n".join(lines) + end.encode())
    return path


def convert(source, target) -> Database:
    posts_json.write_database(source, target)
    return Database(target)


def caption_lists(database, ids=None):
    parameters = params.load("params.yaml").caption
    table = captions.caption_posts(database, database.post_ids() if ids is None else ids, parameters)
    return dict(zip(table["post_id"].to_pylist(), table["caption"].to_pylist(), strict=True))


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """3,000 made-up posts without the tags that posts.json cannot say, relations in the order of a database."""
    folder = tmp_path_factory.mktemp("collection")
    synthetic_danbooru.write(folder, 3000, 7, True)
    with sqlite3.connect(folder / "danbooru2023.db") as connection:
        connection.execute("""DELETE FROM posttagrelation WHERE tag_id IN (SELECT id FROM tag
            WHERE type IS NULL OR type > 4 OR coalesce(name, '') = '' OR instr(name, ' '))""")
    connection.close()
    return folder


def sort_relations(source, target):
    """The database with each post's tags in alphabetical order."""
    with sqlite3.connect(source) as old, sqlite3.connect(target) as new:
        old.backup(new)
        rows = old.execute("""SELECT post_id, tag_id FROM posttagrelation JOIN tag ON tag.id = tag_id
            ORDER BY post_id, tag.name""").fetchall()
        new.execute("DELETE FROM posttagrelation")
        new.executemany("INSERT INTO posttagrelation (post_id, tag_id) VALUES (?, ?)", rows)
    old.close()
    new.close()
    return Database(target)


def stages(database, folder, recipe):
    """What select, filter and caption make of a database."""
    chosen = selection.select(database, recipe.selection)
    ids = chosen["post_id"].to_numpy()
    kept = filtering.filter_posts(database, tars.tars_in(folder / "images"), ids, recipe.filter, recipe.caption)
    return chosen, *kept, captions.caption_posts(database, kept[0]["post_id"].to_numpy(), recipe.caption)


@pytest.mark.parametrize(
    "alphabetical", [pytest.param(True, marks=pytest.mark.slow), pytest.param(False, marks=pytest.mark.ci)]
)
def test_the_same_posts_give_the_same_selection_posts_and_captions_both_ways(tmp_path, collection, alphabetical):
    recipe = params.load("params.yaml")
    ranges = [
        each.model_copy(update={"draw": 700 if each.draw != "all" else "all"}) for each in recipe.selection.ranges
    ]
    recipe = recipe.model_copy(update={"selection": recipe.selection.model_copy(update={"ranges": ranges})})
    database = Database(collection / "danbooru2023.db")
    if alphabetical:
        database = sort_relations(database.path, tmp_path / "sorted.db")
    source = synthetic_originals.write_posts_json(database.path, tmp_path / "posts.json", alphabetical)
    converted = convert(source, tmp_path / "converted.db")
    schema.check_schema(converted)
    ours, theirs = (stages(each, collection, recipe) for each in (converted, database))
    for one, other in zip(ours, theirs, strict=True):
        assert one.equals(other) and one.num_rows
    assert pc.count_distinct(ours[2]["reason"]).as_py() > 4


def test_where_the_databases_order_is_not_alphabetical_posts_json_gives_the_same_words_in_alphabetical_order(
    tmp_path, collection
):
    database = Database(collection / "danbooru2023.db")
    converted = convert(
        synthetic_originals.write_posts_json(database.path, tmp_path / "posts.json"), tmp_path / "converted.db"
    )
    parameters = params.load("params.yaml").caption
    with sqlite3.connect(converted.path) as connection, sqlite3.connect(database.path) as release:
        posts = connection.execute("SELECT id FROM post WHERE rating + fav_count IS NOT NULL").fetchmany(500)
        differ = 0
        for (post,) in posts:
            ours, theirs = caption(connection, post, parameters), caption(release, post, parameters)
            assert sorted(ours[0]) == sorted(theirs[0]) and sorted(ours[1]) == sorted(theirs[1])
            differ += ours != theirs
        strings = connection.execute("""SELECT group_concat(name, ' ') FROM (SELECT post_id, type, name
            FROM posttagrelation JOIN tag ON tag.id = tag_id ORDER BY posttagrelation.id) GROUP BY post_id, type""")
        assert all(text.split(" ") == sorted(text.split(" ")) for (text,) in strings)
    connection.close()
    release.close()
    assert differ > 400


def test_posts_that_only_gold_accounts_see_and_unknown_values_are_read_as_such(tmp_path):
    hidden = {name: value for name, value in {**POST, "id": 2}.items() if name not in ("md5", "file_url")}
    nothing = dict.fromkeys(("created_at", "rating", "fav_count", "file_ext", "is_deleted", "tag_string_general"))
    source = write(tmp_path / "p", {}, json.dumps(hidden).encode(), b"", b" \r", {"id": 7, **nothing}, end="")
    database = convert(source, tmp_path / "a.db")
    rows = sqlite3.connect(database.path).execute("SELECT id, md5, file_url, rating, fav_count FROM post").fetchall()
    assert rows == [
        (1, "0" * 32, POST["file_url"], 0, 5),
        (2, None, None, 0, 5),
        (7, "0" * 32, POST["file_url"], *[None] * 2),
    ]
    assert set(caption_lists(database, [1, 2]).values()) == {", |||a bc, solo, recent, safe, normal quality"}


def test_the_last_line_of_a_post_counts(tmp_path, capsys):
    source = write(
        tmp_path / "p", {"tag_string_general": "old_tag solo"}, {"id": 2}, {"tag_string_general": "new_tag"}, {"id": 2}
    )
    database = convert(source, tmp_path / "a.db")
    assert [text.split(", recent")[0] for text in caption_lists(database).values()] == [
        ", |||new tag",
        ", |||a bc, solo",
    ]
    assert "2 lines are of posts that a later line has again" in capsys.readouterr().err


def test_a_tag_has_the_class_that_its_own_line_says(tmp_path):
    source = write(
        tmp_path / "p", {"tag_string_general": "name"}, {"id": 2, "tag_string_general": "", "tag_string_artist": "name"}
    )
    texts = caption_lists(convert(source, tmp_path / "a.db"))
    assert texts[1].startswith(", |||name, ") and texts[2].startswith("name, |||recent")


def test_a_file_without_general_ratings_is_told(tmp_path, capsys):
    convert(write(tmp_path / "p", {"rating": "s"}), tmp_path / "a.db")
    assert "no post has the rating g" in capsys.readouterr().err


BAD_LINES = {
    "{": "line 2: it is not JSON",
    "[]": "line 2: the file's content is",
    json.dumps({**POST, "id": "2"}): "line 2: id is '2'; it must be a whole number",
    json.dumps({**POST, "id": 1 << 31}): "line 2: id is 2147483648; it must be less than 2147483648",
    json.dumps({**POST, "id": 0}): "line 2: id is 0; it must be greater than 0",
    json.dumps({**POST, "id": 2.0}): "line 2: id is 2.0",
    json.dumps({**POST, "rating": "safe"}): "line 2: rating is 'safe'; it must be 'g', 's', 'q' or 'e'",
    json.dumps({**POST, "is_deleted": "f"}): "line 2: is_deleted is 'f'; it must be true or false",
    json.dumps({**POST, "tag_string_general": ["a"]}): "line 2: tag_string_general",
    json.dumps({name: value for name, value in POST.items() if name != "tag_string_meta"}): "_meta is missing",
    json.dumps(POST).replace("a_bc", "\\ud83d"): "line 2: it is not JSON",
    json.dumps(POST).replace("a_bc", "\x1b[2J"): "line 2: it is not JSON",
    "[" * 100_000: "line 2: it is not JSON",
    f'{{"id": {"9" * 5000}': "line 2: it is not JSON",
    json.dumps({**POST, "source": "x" * (1 << 20)}): "line 2: it has more than 1,048,576 bytes",
}  # fmt: skip


@pytest.mark.parametrize("line, sentence", BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_line_that_is_no_post_is_named_by_its_number(tmp_path, line, sentence):
    source = write(tmp_path / "p", {}, line.encode(), {"id": 3})
    with pytest.raises(UserError) as refusal:
        convert(source, tmp_path / "a.db")
    message = refusal.value.message
    assert sentence in message and str(source) in message and "download.inputs.posts" in message
    assert len(message) < 2000 and message.isprintable()


def test_bytes_that_are_not_utf8_an_array_and_an_empty_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="line 1: it is not JSON"):
        convert(write(tmp_path / "p", json.dumps(POST).encode().replace(b"solo", b"\xff")), tmp_path / "a.db")
    with pytest.raises(UserError, match="line 1: "):
        convert(write(tmp_path / "p", json.dumps([POST, POST]).encode()), tmp_path / "b.db")
    for name, text in (("c.db", b""), ("d.db", b"\n\n")):
        (tmp_path / "p").write_bytes(text)
        with pytest.raises(UserError, match="has no post"):
            convert(tmp_path / "p", tmp_path / name)
        with pytest.raises(UserError, match="has no post"):
            posts_json.check_beginning(tmp_path / "p")


def test_a_file_of_one_endless_line_is_refused_from_its_beginning(tmp_path):
    with open(tmp_path / "p", "wb") as file:
        file.truncate(1 << 40)  # zeros, without a line's end
    with pytest.raises(UserError, match="line 1: it has more than"):
        convert(tmp_path / "p", tmp_path / "a.db")


def test_memory_does_not_grow_with_the_file(tmp_path):
    line = json.dumps({**POST, "source": "x" * 3000, "tag_string_general": " ".join(f"tag_{n}" for n in range(40))})
    script = """import resource, sys
from pathlib import Path
from kohaku_delta.danbooru import posts_json
posts_json.write_database(Path(sys.argv[1]), Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    peaks = []
    for count in (20_000, 80_000):
        source = tmp_path / f"{count}.json"
        with open(source, "w") as file:
            file.writelines(line.replace('"id": 1,', f'"id": {number},') + "\n" for number in range(1, count + 1))
        arguments = [sys.executable, "-c", script, source, tmp_path / f"{count}.db"]
        done = subprocess.run(
            arguments, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": "src"}
        )
        peaks.append(int(done.stdout) << 10)
    assert peaks[1] - peaks[0] < 60 << 20 < source.stat().st_size / 4


def test_the_same_file_gives_the_same_bytes_and_is_converted_once(tmp_path, monkeypatch):
    source = write(tmp_path / "p", *({"id": number, "tag_string_artist": f"by_{number}"} for number in range(1, 60)))
    path, found = posts_json.converted_database(source, "ab" * 32, tmp_path / "mirror")
    _, other = posts_json.converted_database(source, "ab" * 32, tmp_path / "other")
    assert path == tmp_path / "mirror" / "converted" / ("ab" * 32) / "danbooru2023.db"
    assert found.sha256 == other.sha256 == hash_file(path)
    with monkeypatch.context() as patch:
        patch.setattr(posts_json, "write_database", None)
        assert posts_json.converted_database(source, "ab" * 32, tmp_path / "mirror")[1] == found


@pytest.mark.parametrize("damage", ["bytes", "note", "no note", "another writer", "gone"])
def test_a_converted_database_that_is_not_as_noted_is_made_again(tmp_path, damage):
    source = write(tmp_path / "p", {})
    path, found = posts_json.converted_database(source, "0" * 64, tmp_path)
    note = path.with_name("made.json")
    if damage == "bytes":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    elif damage == "note":
        note.write_bytes(b"[" * 100_000)
    elif damage == "no note":
        note.unlink()
    elif damage == "another writer":
        note.write_text(json.dumps({"by": "", "sha256": found.sha256}))
    else:
        path.unlink()
    again = posts_json.converted_database(source, "0" * 64, tmp_path)
    assert again[0] == path and again[1].sha256 == found.sha256 == hash_file(path)


def test_a_conversion_that_is_killed_leaves_no_database(tmp_path):
    source = tmp_path / "p"
    os.mkfifo(source)
    script = f"""from pathlib import Path
from kohaku_delta.danbooru import posts_json
posts_json.file_download.require_free_space = lambda *_: None
posts_json.converted_database(Path({str(source)!r}), "0" * 64, Path({str(tmp_path)!r}))"""
    child = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": "src"})
    with open(source, "wb") as file:
        for number in itertools.count(1):
            file.write(json.dumps({**POST, "id": number}).encode() + b"\n")
            if number == 40_000:
                file.flush()
                child.send_signal(signal.SIGKILL)
                child.wait()
                break
        source.unlink()
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), file.fileno())  # nobody reads the rest
    assert not (tmp_path / "converted" / ("0" * 64)).exists()
    write(source, {})
    path, _ = posts_json.converted_database(source, "0" * 64, tmp_path)
    assert list(caption_lists(Database(path))) == [1] and os.listdir(path.parent.parent) == ["0" * 64]


def recipe_with(tmp_path, change):
    text = (ROOT / "params.yaml").read_text()
    start, end = text.index("    database: "), text.index("    tars: ")
    (tmp_path / "params.yaml").write_text(text[:start] + change + text[end:])
    return tmp_path / "params.yaml"


POSTS_PIN = "    posts: {url: 'file://posts.json', bytes: null, sha256: null}\n"


def test_a_recipe_names_one_source_of_posts(tmp_path):
    params.load(recipe_with(tmp_path, POSTS_PIN))
    both = POSTS_PIN + POSTS_PIN.replace("posts:", "database:")
    with pytest.raises(UserError, match="inputs has both posts and database; .* keep one of them"):
        params.load(recipe_with(tmp_path, both))
    listed = "    posts: [{url: 'file://posts.json', bytes: null, sha256: null}]\n"
    with pytest.raises(UserError, match="inputs.posts is a list; it must be one file"):
        params.load(recipe_with(tmp_path, listed))


def test_preflight_reads_the_beginning_of_a_local_posts_json(tmp_path):
    recipe = params.load(recipe_with(tmp_path, POSTS_PIN))
    assert host_facts.database_error(recipe, tmp_path) is None
    write(tmp_path / "posts.json", {})
    assert host_facts.database_error(recipe, tmp_path) == ""
    write(tmp_path / "posts.json", {}, b"{}")
    result = host_checks.check_database(Host({}, database=host_facts.database_error(recipe, tmp_path)), recipe)
    assert not result.ok and "posts.json, line 2: the key id is missing" in result.what


def test_preflight_counts_the_database_that_is_made_of_posts_json(tmp_path):
    url = "hf://datasets/nyanko7/danbooru2023/"
    recipe = params.load(recipe_with(tmp_path, POSTS_PIN.replace("bytes: null", "bytes: 20700000000")))
    spans = ("original/data-{0000..0999}.tar", "recent/data-{1000..1999}.tar")
    tar_pins = [params.Pin(url=url + span, bytes=None, sha256=None) for span in spans]
    inputs = recipe.download.inputs | {"tars": tar_pins}
    download = recipe.download.model_copy(update={"inputs": inputs})
    sizes = {
        each.what: each.bytes
        for each in estimates.download_sizes(recipe.model_copy(update={"download": download}), None)
    }
    assert sizes["database made of posts"] == 6_417_000_000 and sizes["2,000 tars"] == 8 * 10**12
    assert host_facts._tars_error(recipe.model_copy(update={"download": download}), tmp_path) == ""
