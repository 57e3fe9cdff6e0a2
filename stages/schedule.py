"""schedule: the whole order of training. Reads posts.parquet; writes schedule.parquet (every micro-batch of every step)
and bucket.txt.
"""

import os
import sys

sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")

from pathlib import Path

import click

from kohaku_delta import atomic_files, paths
from kohaku_delta import params as recipes
from kohaku_delta.cli.stage_command import FILE, StageCommand, print_summary
from kohaku_delta.formats import parquet
from kohaku_delta.training import schedule as schedules


@click.command(cls=StageCommand)
@click.option("--params", type=FILE, default="params.yaml", help="The recipe.")
@click.option("--posts", type=FILE, default=paths.POSTS, help="The posts to train on.")
@click.option("--out", type=FILE, default=paths.SCHEDULE, help="Every micro-batch of every step.")
@click.option("--buckets", type=FILE, default=paths.BUCKETS, help="Images per bucket, in the published format.")
def main(params: Path, posts: Path, out: Path, buckets: Path) -> None:
    """Compute every micro-batch of every step."""
    recipe = recipes.load(params)
    order, counts = schedules.build_schedule(parquet.read(posts, ["post_id", "width", "height"]), recipe.schedule)
    with atomic_files.atomic_write(buckets, "w") as file:
        file.write(schedules.bucket_lines(counts))
    parquet.write(order, out)
    images, steps = sum(count for _, count in counts), order["step"][-1].as_py() + 1
    print_summary(
        "schedule",
        f"{images:,} images in {len(counts)} buckets, B = {order.num_rows:,} micro-batches, {steps:,} steps → "
        f"{out}, {buckets}",
    )


if __name__ == "__main__":
    main()
