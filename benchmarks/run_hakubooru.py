"""Runs HakuBooru's own code with the release's settings; nothing of it is repeated here.

Runs in an environment of its own (benchmarks/dataset.py makes it), which holds the package and not this project. The
package on the index is younger than the release, so the release's settings are set from outside: its processors (year,
rating, quality by p95 … p10, none above 7,000,000), artists named "banned" kept, and dateutil's idea of today, which
the release's tool took from the clock.
"""

import argparse
import datetime
import functools
import json
import os
import random
import resource
import time
from random import choices

import dateutil.parser
import hakubooru.caption
from hakubooru.caption import KohakuCaptioner
from hakubooru.dataset import Post, load_db
from hakubooru.export import Exporter, FileSaver
from hakubooru.source import TarSource
from hakubooru.tag_generator import quality_tag, rating_tag, year_tag

TODAY = datetime.datetime(2024, 2, 14)


class Saver(FileSaver):
    """HakuBooru's own saver, which writes an image and a text per post. Keeps the captions too, for the comparison."""

    def __init__(self, folder: str | None):
        self.captions = {}
        self.written = folder is not None
        if folder:
            super().__init__(folder)

    def __call__(self, img_id, img_data, img_ext, caption):
        if self.written:
            super().__call__(img_id, img_data, img_ext, caption)
        self.captions[img_id] = caption


def as_released() -> None:
    if hasattr(hakubooru.caption, "tags_filter"):
        younger = hakubooru.caption.tags_filter
        hakubooru.caption.tags_filter = lambda tag, words: words == ["banned"] or younger(tag, words)
    today = dateutil.parser.parserinfo()
    today._year, today._century = TODAY.year, TODAY.year // 100 * 100
    dateutil.parser.parse = functools.partial(dateutil.parser.parser(today).parse, default=TODAY)


def main() -> None:
    arguments = argparse.ArgumentParser()
    for name in ("--database", "--tars", "--seed", "--ranges", "--out"):
        arguments.add_argument(name, required=True)
    arguments.add_argument(
        "--files", help="Where its files go; without, it keeps captions in memory and drops the images."
    )
    arguments = arguments.parse_args()
    as_released()
    started = time.perf_counter()
    load_db(arguments.database)
    saver = Saver(arguments.files)
    captioner = KohakuCaptioner(processors=[year_tag, rating_tag, quality_tag])
    exporter = Exporter(
        source=TarSource(arguments.tars),
        saver=saver,
        captioner=captioner,
        process_batch_size=100_000,
        process_threads=2,
    )
    random.seed(int(arguments.seed))
    chosen = []
    for part in json.loads(arguments.ranges):
        posts = Post.select().where(Post.id >= part["from"], Post.id < (part["below"] or 1 << 62))
        chosen += list(posts) if part["draw"] == "all" else choices(posts, k=part["draw"])
    selected = time.perf_counter()
    exporter.export_posts(chosen)
    seconds = time.perf_counter() - started
    with open(arguments.out, "w", encoding="utf-8") as file:
        for post in sorted(saver.captions):
            file.write(json.dumps([post, saver.captions[post]]) + "\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {
                "seconds": seconds,
                "select_seconds": selected - started,
                "peak_mib": peak,
                "posts": len(saver.captions),
                "pid": os.getpid(),
            }
        )
    )


if __name__ == "__main__":
    main()
