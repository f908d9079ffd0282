"""Intervals of a realised contrast cover seeds and held-out samples at once; those over seeds alone do not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student_t

from patterning_dist.response.contrast import crossed_contrast, influence, part_names

REPEATS, TRUTH = 400, -0.4


def draw(rng, num_seeds, per_group, seeds, groups, samples, both):
    """Differences of a gap between two kinds of tokens: each seed's, and influences [seed, sample].

    seeds, groups, samples, both: standard deviations of what all samples of a seed, all samples of a group in all
    seeds, a sample in all seeds, and a sample in one seed have in common.
    """
    group = np.repeat(np.arange(len(per_group)), per_group)
    num = len(group)
    kinds = rng.integers(3, 20, (num, 2))
    shares = kinds / kinds.sum(axis=0) * [1, -1]
    effect = seeds * rng.normal(size=(num_seeds, 1)) + groups * rng.normal(size=len(per_group))[group]
    effect = effect + samples * rng.normal(size=num) + both * rng.normal(size=(num_seeds, num))
    sums = np.stack([TRUTH + 1.3 + effect, np.full_like(effect, 1.3)], axis=-1) * shares  # seed sample sign
    return sums.sum(axis=(1, 2)), np.concatenate([influence(one[None], shares[None]) for one in sums]), group


EQUAL, UNEQUAL = [4] * 40, [1, 2, 3, 9] * 12
CASES = {
    "seeds": (4, EQUAL, 0.2, 0.05, 0.1, 0.1),
    "documents": (3, EQUAL, 0.02, 0.4, 0.2, 0.1),
    "unequal documents": (5, UNEQUAL, 0.03, 0.2, 0.3, 0.2),
    "samples": (3, [1] * 90, 0.0, 0.0, 0.5, 0.1),
    "both": (6, EQUAL, 0.03, 0.15, 0.2, 0.2),
    "a sample in a seed": (8, EQUAL, 0.01, 0.02, 0.1, 0.5),
    "two seeds": (2, EQUAL, 0.1, 0.2, 0.1, 0.1),
    "two seeds that differ": (2, EQUAL, 0.4, 0.2, 0.1, 0.1),
}


@pytest.mark.parametrize("case", CASES)
def test_intervals_cover(case):
    found = [crossed_contrast(*one) for one in repeats(case)]
    covered = share_within([(c.value - c.half_width, c.value + c.half_width) for c in found])
    assert 0.90 < covered < 0.99


def repeats(case):
    rng = np.random.default_rng(list(CASES).index(case))
    return [draw(rng, *CASES[case]) for _ in range(REPEATS)]


def share_within(intervals):
    return np.mean([low < TRUTH < high for low, high in intervals])


@pytest.mark.parametrize("case", ["documents", "samples"])
def test_an_interval_over_seeds_alone_does_not_cover(case):
    found = []
    for values, *_ in repeats(case):
        width = student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
        found.append((values.mean() - width, values.mean() + width))
    assert share_within(found) < 0.6


def test_an_interval_over_sequences_alone_does_not_cover():
    found = [crossed_contrast(*one) for one in repeats("seeds")]
    assert share_within([(c.value - 2 * c.over_sequences, c.value + 2 * c.over_sequences) for c in found]) < 0.6


def test_trainings_that_differ_in_nothing_leave_the_error_of_the_samples():
    values, influences, group = draw(np.random.default_rng(0), 5, EQUAL, 0.0, 0.3, 0.2, 0.0)
    found, one = crossed_contrast(values, influences, group), crossed_contrast(values[:1], influences[:1], group)
    assert found.over_seeds < 1e-12
    assert found.standard_error == pytest.approx(found.over_sequences, rel=1e-12) == one.over_sequences
    assert found.half_width == pytest.approx(student_t.ppf(0.975, len(EQUAL) - 1) * found.standard_error)


def test_where_one_of_the_two_is_unknown_there_is_no_interval():
    values, influences, group = draw(np.random.default_rng(1), 3, EQUAL, 0.1, 0.3, 0.2, 0.1)
    one_seed, one_document = (
        crossed_contrast(values[:1], influences[:1], group),
        crossed_contrast(values, influences, np.zeros_like(group)),
    )
    assert (one_seed.over_seeds, one_seed.half_width) == (None, None) and one_seed.over_sequences > 0
    assert (one_document.over_sequences, one_document.half_width) == (None, None) and one_document.over_seeds > 0


def test_samples_that_take_no_part_change_nothing():
    values, influences, group = draw(np.random.default_rng(2), 3, EQUAL, 0.1, 0.3, 0.2, 0.1)
    wider = np.concatenate([influences, np.full((3, 50), np.nan)], axis=1)
    assert crossed_contrast(values, wider, np.concatenate([group, 90 + np.arange(50)])) == pytest.approx(
        crossed_contrast(values, influences, group)
    )


def test_terms_are_called_by_the_name_of_the_split():
    assert part_names("induction_minus_rest") == ("induction", "rest")
    assert part_names("margin") == ("positive", "negative")
