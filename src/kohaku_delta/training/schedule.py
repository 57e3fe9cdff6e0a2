"""The schedule: every micro-batch of every step, known before training starts; posts and parameters alone decide it.

A bucket's posts are shuffled and cut into micro-batches (the last one ragged); all micro-batches of the epoch are
permuted; a step takes the next `micro_batches` of them. The one at place p of its step belongs to lane p mod lanes.
A visit's counter is epoch · N + row of the post in posts.parquet, so it does not depend on the order.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_delta.errors import UserError
from kohaku_delta.params import Schedule
from kohaku_delta.training import buckets

SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("lane", pa.int16()),
        ("place", pa.int16()),  # position of the micro-batch within its step
        ("width", pa.int32()),  # of the bucket, pixels
        ("height", pa.int32()),
        ("posts", pa.list_(pa.int64())),
        ("visits", pa.list_(pa.int64())),
    ]
)


def _keys(seed: int, epoch: int, stream: int, count: int) -> np.ndarray:
    """uint64 sort keys (count,) of a counter-based generator; (seed, epoch, stream) selects the sequence."""
    return np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, stream]).random_raw(count)


def _epoch(epoch: int, bucket_of: np.ndarray, parameters: Schedule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order of rows; start and length of each micro-batch in that order; the micro-batches in training order."""
    order = np.lexsort((_keys(parameters.seed, epoch, 0, len(bucket_of)), bucket_of))
    _, firsts, counts = np.unique(bucket_of[order], return_index=True, return_counts=True)
    starts = np.concatenate(
        [np.arange(first, first + count, parameters.batch_size) for first, count in zip(firsts, counts, strict=True)]
    )
    ends = np.minimum(starts + parameters.batch_size, np.repeat(firsts + counts, -(-counts // parameters.batch_size)))
    permutation = np.argsort(_keys(parameters.seed, epoch, 1, len(starts)), kind="stable")
    return order, starts[permutation], (ends - starts)[permutation]


def build_schedule(posts: pa.Table, parameters: Schedule) -> tuple[pa.Table, list[tuple[tuple[int, int], int]]]:
    """The schedule (SCHEMA) up to `max_steps`, and (bucket, number of images) of each bucket that occurs in an epoch.

    posts: post_id, width, height, ascending by post_id. Raises UserError if there are none.
    """
    count = posts.num_rows
    if count == 0:
        raise UserError(
            "posts.parquet contains no posts: there is nothing to train on. See dropped.parquet for the reasons."
        )
    ids = posts["post_id"].to_numpy()
    sizes = buckets.all_buckets(parameters)
    chosen = buckets.choose_bucket(posts["width"].to_numpy(), posts["height"].to_numpy(), sizes)
    occurring, bucket_of, images = np.unique(chosen, return_inverse=True, return_counts=True)

    tables, steps = [], 0
    for epoch in range(parameters.epochs):
        order, starts, lengths = _epoch(epoch, bucket_of, parameters)
        number = np.arange(len(starts))
        place = number % parameters.micro_batches
        rows = order[np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths) + np.arange(count)]
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        size = np.array([sizes[index] for index in occurring])[bucket_of[order[starts]]]
        columns = [
            pa.array(steps + number // parameters.micro_batches, pa.int32()),
            pa.array(place % parameters.lanes, pa.int16()),
            pa.array(place, pa.int16()),
            pa.array(size[:, 0], pa.int32()),
            pa.array(size[:, 1], pa.int32()),
            pa.ListArray.from_arrays(offsets, pa.array(ids[rows])),
            pa.ListArray.from_arrays(offsets, pa.array(epoch * count + rows, pa.int64())),
        ]
        tables.append(pa.Table.from_arrays(columns, schema=SCHEMA))
        steps += -(-len(starts) // parameters.micro_batches)
    whole = pa.concat_tables(tables)
    last = steps if parameters.max_steps is None else parameters.max_steps
    schedule = whole.filter(pc.less(whole["step"], last))
    return schedule, [(sizes[index], int(n)) for index, n in zip(occurring, images, strict=True)]


def bucket_lines(counts: list[tuple[tuple[int, int], int]]) -> str:
    """The published format: `bucket 0: resolution (256, 3328), count: 177`."""
    return "".join(
        f"bucket {index}: resolution ({size[0]}, {size[1]}), count: {count}\n"
        for index, (size, count) in enumerate(counts)
    )
