"""A visit is a function: of its seed and counter, not of what was computed before it."""

import numpy as np

from kohaku_delta.training import visit

TEXT = "1girl, marumi, shape quest, |||red body, circle, smile, highres, mid, safe, best quality"


def captions(count, **changes):
    arguments = {"separator": "|||", "shuffle": True, "tag_dropout": 0.1, "seed": 1337} | changes
    return [visit.caption(TEXT, visit=number, **arguments) for number in range(count)]


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


def test_without_shuffle_and_dropout_the_caption_is_as_written():
    assert captions(1, shuffle=False, tag_dropout=0.0) == ["1girl, marumi, shape quest, red body, circle, smile, highres, mid, safe, best quality"]


def test_an_empty_kept_part_leaves_no_comma_behind():
    assert visit.caption(", |||circle", "|||", False, 0.0, 1, 1) == "circle"


def test_visits_do_not_depend_on_their_order_and_differ_from_each_other():
    forwards = [visit.normal((4, 8, 8), 1, number, visit.NOISE) for number in range(20)]
    backwards = [visit.normal((4, 8, 8), 1, number, visit.NOISE) for number in reversed(range(20))][::-1]
    assert all((a == b).all() for a, b in zip(forwards, backwards))
    assert len({array.tobytes() for array in forwards}) == 20
    assert visit.normal((4, 8, 8), 1, 0, visit.LATENT).tobytes() != forwards[0].tobytes()


def test_noise_has_the_offsets_variance_between_channels():
    drawn = np.stack([visit.noise((4, 16, 16), 0.05, 1, number) for number in range(4000)])
    means = drawn.mean(axis=(2, 3)).astype(np.float64)
    expected = 1 / 256 + 0.05**2
    assert abs(means.var() - expected) < 5 * expected * (2 / means.size) ** 0.5
    assert abs(drawn.std() - (1 + 0.05**2) ** 0.5) < 0.002


def test_time_steps_are_uniform():
    drawn = np.array([visit.time_step(1337, number) for number in range(20000)])
    assert drawn.min() == 0 and drawn.max() == 999
    counts = np.bincount(drawn // 100, minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
