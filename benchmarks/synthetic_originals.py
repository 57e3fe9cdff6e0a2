"""Makes of a synthetic collection the same posts in the layout of nyanko7/danbooru2023: metadata/posts.json (JSON
Lines) and original/, recent/ and updates/<date>/ with members of every kind. The same collection gives the same bytes.

Run: `python benchmarks/synthetic_danbooru.py work/bench/100000 --posts 100000`, then
`python benchmarks/synthetic_originals.py work/bench/100000 work/bench/originals`. Tags are written alphabetically, as
Danbooru writes them, unless --database-order keeps the order of the database.
"""

import io
import json
import sqlite3
import tarfile
from collections import defaultdict
from functools import cache
from pathlib import Path

import click
from PIL import Image

CLASSES = ("general", "artist", "character", "copyright", "meta")
RATINGS = {None: None, 0: "g", 1: "s", 2: "q", 3: "e"}
KINDS = ("jpg", "png", "jpg", "gif", "mp4", "jpg", "zip", "webm", "jpeg", "swf")  # one after another
UPDATES = ("20240319", "20240522")


def post_lines(database: Path, alphabetical: bool = True):
    """The lines of posts.json, by id: what Danbooru's API says of each post. Tags that it could not say are left out:
    those without name or type, and names with spaces.
    """
    with sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True) as connection:
        tags = {
            number: (name, kind)
            for number, name, kind in connection.execute("SELECT id, name, type FROM tag")
            if name and " " not in name and kind in range(5)
        }
        pairs = connection.execute("SELECT post_id, tag_id FROM posttagrelation ORDER BY post_id, id")
        pair = next(pairs, None)
        rows = connection.execute("SELECT * FROM post ORDER BY id")
        columns = [column[0] for column in rows.description]
        for row in rows:
            post = dict(zip(columns, row, strict=True))
            own = defaultdict(list)
            while pair and pair[0] <= post["id"]:
                if pair[0] == post["id"] and pair[1] in tags:
                    name, kind = tags[pair[1]]
                    own[CLASSES[kind]].append(name)
                pair = next(pairs, None)
            strings = {kind: " ".join(sorted(own[kind]) if alphabetical else own[kind]) for kind in CLASSES}
            line = {
                "id": post["id"],
                "created_at": post["created_at"],
                "uploader_id": post["uploader_id"],
                "score": post["score"],
                "source": post["source"],
                "md5": post["md5"],
                "rating": RATINGS[post["rating"]],
                "image_width": post["image_width"],
                "image_height": post["image_height"],
                "tag_string": " ".join(sorted(name for names in own.values() for name in names)),
                "fav_count": post["fav_count"],
                "file_ext": post["file_ext"],
                "parent_id": post["parent_id"],
                "has_children": bool(post["has_children"]),
                "file_size": post["file_size"],
                "up_score": post["up_score"],
                "down_score": post["down_score"],
                "is_pending": False,
                "is_flagged": False,
                "is_deleted": bool(post["is_deleted"]),
                "is_banned": bool(post["is_banned"]),
                "pixiv_id": post["pixiv_id"],
                "bit_flags": post["bit_flags"],
                "has_large": bool(post["has_large"]),
                **{f"tag_string_{kind}": text for kind, text in strings.items()},
                **{name: post[name] for name in ("file_url", "large_file_url", "preview_file_url")},
                "updated_at": post["created_at"],
            }
            if post["md5"] is None:
                for name in ("md5", "file_url", "large_file_url", "preview_file_url"):
                    del line[name]
            yield json.dumps(line, ensure_ascii=False)


def write_posts_json(database: Path, path: Path, alphabetical: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in post_lines(database, alphabetical))
    return path


def original(number: int, kind: str) -> bytes:
    """A small file of a kind; only pictures are real."""
    name = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "gif": "GIF"}.get(kind)
    return picture(number % 35, name) if name else f"{kind} of post {number}".encode()


@cache
def picture(number: int, name: str) -> bytes:
    file = io.BytesIO()
    size = 300 + number % 7 * 100, 300 + number % 5 * 150
    Image.new("RGB", size, (number * 7, 100, 90)).save(file, name)
    return file.getvalue()


def write_tars(images: Path, folder: Path) -> None:
    """Tars of the originals of the posts that the collection's tars (images) hold."""
    for path in sorted(images.glob("data-*.tar")):
        number = int(path.stem[5:])
        with tarfile.open(path) as tar:
            ids = [int(member.name.split(".")[0]) for member in tar]
        if number < 2000:
            targets = {folder / ("original" if number < 1000 else "recent") / path.name: ids}
        else:
            targets = {
                folder / "updates" / date / f"dataset-{last}.tar": [
                    post for post in ids if post % 10 == last and (post // 10 % 2 == place or post // 20 % 5 == 0)
                ]
                for place, date in enumerate(UPDATES)
                for last in range(10)
            }
        for target, posts in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as tar:
                for post in posts:
                    kind = KINDS[post // 1000 % len(KINDS)]
                    data = original(post, kind)
                    member = tarfile.TarInfo(f"{post}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


@click.command()
@click.argument("collection", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--database-order", is_flag=True, help="Tags in the order of posttagrelation.id instead of alphabetical.")
def main(collection: Path, folder: Path, database_order: bool) -> None:
    """The posts of a synthetic collection in the layout of nyanko7/danbooru2023."""
    path = write_posts_json(collection / "danbooru2023.db", folder / "metadata" / "posts.json", not database_order)
    write_tars(collection / "images", folder)
    click.echo(f"{path.stat().st_size:,} bytes of posts.json → {folder}")


if __name__ == "__main__":
    main()
