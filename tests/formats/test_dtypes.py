"""fp16 and bfloat16 as numpy, torch and IEEE have them: exact when read, rounded once to nearest even when written."""

import numpy as np
import pytest
import torch

from kohaku_delta.formats import dtypes

KINDS = (("F16", torch.float16), ("BF16", torch.bfloat16))


def same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal bits, except where both are NaN."""
    return bool(
        ((ours == theirs) | (np.isnan(ours) & np.isnan(theirs))).all()
        and (np.signbit(ours) == np.signbit(theirs))[~np.isnan(theirs)].all()
    )


@pytest.mark.parametrize("dtype, kind", KINDS)
def test_every_16_bit_number_is_read_exactly_and_written_back(dtype, kind):
    bits = np.arange(1 << 16, dtype=np.uint16)
    stored = bits.view(dtypes.NUMPY[dtype])
    theirs = torch.from_numpy(bits.view(np.int16).copy()).view(kind).float().numpy()
    ours = dtypes.to_float32(stored, dtype)
    assert same(ours, theirs)
    number = ~np.isnan(theirs)
    assert np.array_equal(dtypes.from_float32(ours, dtype).view(np.uint16)[number], bits[number])
    assert np.array_equal(
        [dtypes.all_finite(stored[i : i + 1], dtype) for i in range(0, 1 << 16, 7)], np.isfinite(theirs[::7])
    )


@pytest.mark.parametrize("dtype, kind", KINDS)
def test_ties_edges_and_any_numbers_are_rounded_as_torch_rounds_them(dtype, kind):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(kind).float().numpy()
    every = np.sort(every[np.isfinite(every)])
    between = ((every[1:].astype(np.float64) + every[:-1]) / 2).astype(np.float32)
    edges = np.concatenate(
        [between, np.nextafter(between, np.float32(np.inf)), np.nextafter(between, np.float32(-np.inf))]
    )
    drawn = np.random.default_rng(1).integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    for values in (
        edges,
        drawn,
        np.array([0.0, -0.0, 65504, 65519.996, 65520, -65520, 1e-45, np.inf, -np.inf], np.float32),
    ):
        values = values[~np.isnan(values)]
        theirs = torch.from_numpy(values).to(kind).view(torch.int16).numpy()
        assert np.array_equal(dtypes.from_float32(values, dtype).view(np.int16), theirs)


@pytest.mark.slow  # five minutes
def test_each_of_the_4294967296_float32_numbers_becomes_the_fp16_number_that_numpy_makes_of_it():
    for start in range(0, 1 << 32, 1 << 22):
        values = np.arange(start, start + (1 << 22), dtype=np.uint32).view(np.float32)
        with np.errstate(all="ignore"):
            theirs = values.astype(np.float16)
        ours = dtypes.from_float32(values, "F16")
        number = ~np.isnan(theirs)
        assert (
            np.array_equal(ours.view(np.uint16)[number], theirs.view(np.uint16)[number])
            and np.isnan(ours[~number]).all()
        )


def test_any_shape_is_kept():
    values = np.random.default_rng(1).normal(size=(3, 5, 2)).astype(np.float32)
    for dtype in dtypes.FLOATS:
        stored = dtypes.from_float32(values, dtype)
        assert dtypes.from_float32(values.T, dtype).shape == (2, 5, 3) and np.array_equal(
            dtypes.from_float32(values.T, dtype), stored.T
        )
        assert (
            dtypes.from_float32(values[:0], dtype).shape == (0, 5, 2)
            and dtypes.to_float32(stored[0, 0, 0], dtype).shape == ()
        )
