"""dataset.json and the folder statistics/, made from the dataset's tables, the database and a tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path

from kohaku_delta import atomic_files
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import dataset_statistics, published_counts
from kohaku_delta.formats import parquet
from kohaku_delta.params import Recipe
from kohaku_delta.report import dataset_plots
from kohaku_delta.sdxl.tokenizer import ClipTokenizer


def write_statistics(
    recipe: Recipe, source: Database, tokenizer: ClipTokenizer, files: Mapping[str, Path], out: Path, folder: Path
) -> tuple[dict, dict | str]:
    """Writes the figures to `out` and the plots into `folder`; returns figures and comparison with what was published.

    files: selection, posts, dropped, captions, artists, characters, buckets.
    """
    published = recipe.published.dataset if recipe.published else None
    ids = parquet.read(files["posts"], ["post_id"])["post_id"].to_numpy()
    length = recipe.train.max_token_length
    figures = dataset_statistics.filter_counts(files["selection"], files["posts"], files["dropped"])
    figures |= dataset_statistics.metadata_counts(source, ids, recipe.caption)
    figures |= dataset_statistics.bucket_counts(files["buckets"], recipe.schedule)
    figures |= dataset_statistics.tag_and_token_counts(files["captions"], source, recipe.caption, tokenizer)
    figures |= {name: dataset_statistics.most_frequent(files[name]) for name in ("artists", "characters")}
    comparison = published_counts.compare_counts(figures, published)
    dataset_plots.draw_plots(figures, recipe.caption, length, published, folder)
    metrics = dataset_statistics.metrics(figures, recipe.caption, length) | {"published": comparison}
    with atomic_files.atomic_write(out, "w") as file:
        json.dump(metrics, file, indent=1, ensure_ascii=False)
        file.write("\n")
    return figures, comparison
