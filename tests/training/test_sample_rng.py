"""A visit is a function: of its seed and counter, not of what was computed before it."""

from collections import Counter
from itertools import permutations
from math import comb, factorial

import numpy as np

from kohaku_delta.training import sample_rng

TEXT = "1girl, marumi, shape quest, |||red body, circle, smile, highres, mid, safe, best quality"


def captions(count, **changes):
    arguments = {"separator": "|||", "shuffle": True, "tag_dropout": 0.1, "seed": 1337} | changes
    return [sample_rng.caption_for(TEXT, visit=number, **arguments) for number in range(count)]


def test_the_kept_part_stays_first_and_whole_and_the_separator_never_shows():
    for text in captions(300):
        assert text.startswith("1girl, marumi, shape quest, ") and "|" not in text


def test_general_tags_are_shuffled_and_one_in_ten_is_dropped():
    drawn = captions(4000)
    general = [text.split(", ")[3:] for text in drawn]
    kept = sum(map(len, general)) / (7 * len(general))
    assert abs(kept - 0.9) < 4 * (0.09 / 28000) ** 0.5
    firsts = [tags[0] for tags in general if len(tags) == 7]
    counts = np.array([firsts.count(tag) for tag in set(firsts)])
    expected = len(firsts) / 7
    assert ((counts - expected) ** 2 / expected).sum() < 22.5  # chi-square, 6 degrees of freedom, p = 0.001


def test_tags_are_dropped_one_by_one_and_every_order_is_as_likely():
    """The number kept is binomial(7, 0.9); of three tags, all six orders and all eight subsets come as often as
    independent draws say.
    """
    counts = np.bincount([len(text.split(", ")) - 3 for text in captions(20000)], minlength=8)
    binomial = np.array([comb(7, k) * 0.9**k * 0.1 ** (7 - k) for k in range(8)]) * 20000
    counts, binomial = np.r_[counts[:4].sum(), counts[4:]], np.r_[binomial[:4].sum(), binomial[4:]]
    assert ((counts - binomial) ** 2 / binomial).sum() < 18.5  # chi-square, 4 degrees of freedom, p = 0.001

    drawn = Counter(sample_rng.caption_for("k, |||a, b, c", "|||", True, 0.3, 7, number) for number in range(40000))
    expected = {
        ", ".join(("k", *order)): 40000 * 0.7**size * 0.3 ** (3 - size) / factorial(size)
        for size in range(4)
        for order in permutations("abc", size)
    }
    assert drawn.keys() == expected.keys()
    assert (
        sum((drawn[text] - number) ** 2 / number for text, number in expected.items()) < 37.7
    )  # 15 degrees of freedom, p = 0.001


def test_another_epoch_draws_another_caption_and_the_kept_part_keeps_its_duplicates():
    assert sample_rng.caption_for("a, a, |||b, b", "|||", False, 0.0, 1, 1) == "a, a, b, b"
    assert sample_rng.caption_for(TEXT, "|||", True, 0.1, 1337, 5) != sample_rng.caption_for(
        TEXT, "|||", True, 0.1, 1337, 5 + 3_665_398
    )


def test_without_shuffle_and_dropout_the_caption_is_as_written():
    assert captions(1, shuffle=False, tag_dropout=0.0) == [
        "1girl, marumi, shape quest, red body, circle, smile, highres, mid, safe, best quality"
    ]


def test_an_empty_kept_part_leaves_no_comma_behind():
    assert sample_rng.caption_for(", |||circle", "|||", False, 0.0, 1, 1) == "circle"


def test_visits_do_not_depend_on_their_order_and_differ_from_each_other():
    forwards = [sample_rng.normal_for((4, 8, 8), 1, number, sample_rng.NOISE) for number in range(20)]
    backwards = [sample_rng.normal_for((4, 8, 8), 1, number, sample_rng.NOISE) for number in reversed(range(20))][::-1]
    assert all((a == b).all() for a, b in zip(forwards, backwards, strict=True))
    assert len({array.tobytes() for array in forwards}) == 20
    assert sample_rng.normal_for((4, 8, 8), 1, 0, sample_rng.LATENT).tobytes() != forwards[0].tobytes()


def test_noise_has_the_offsets_variance_between_channels():
    drawn = np.stack([sample_rng.noise_for((4, 16, 16), 0.05, 1, number) for number in range(4000)])
    means = drawn.mean(axis=(2, 3)).astype(np.float64)
    expected = 1 / 256 + 0.05**2
    assert abs(means.var() - expected) < 5 * expected * (2 / means.size) ** 0.5
    assert abs(drawn.std() - (1 + 0.05**2) ** 0.5) < 0.002


def test_the_noise_offset_is_one_number_a_channel_and_nothing_else():
    plain, offset = sample_rng.noise_for((4, 8, 6), 0.0, 1, 9), sample_rng.noise_for((4, 8, 6), 0.05, 1, 9)
    assert (plain == sample_rng.normal_for((4, 8, 6), 1, 9, sample_rng.NOISE)).all()
    added = (offset - plain).reshape(4, -1)
    assert np.allclose(added, added[:, :1], atol=1e-6) and len(np.unique(added[:, 0].round(5))) == 4
    shifts = np.array(
        [
            (
                sample_rng.noise_for((4, 1, 1), 0.05, 1, number)
                - sample_rng.normal_for((4, 1, 1), 1, number, sample_rng.NOISE)
            )
            / 0.05
            for number in range(5000)
        ]
    ).ravel()
    assert abs(shifts.mean()) < 4 / 20000**0.5 and abs(shifts.var() - 1) < 4 * (2 / 20000) ** 0.5


def test_time_steps_are_uniform():
    drawn = np.array([sample_rng.time_step_for(1337, number) for number in range(20000)])
    assert drawn.min() == 0 and drawn.max() == 999
    counts = np.bincount(drawn // 100, minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
