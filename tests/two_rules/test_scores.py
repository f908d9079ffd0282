"""Directions between two kinds of solutions: what is averaged, cut off, standardised, and how reliable it is."""

from __future__ import annotations

import numpy as np
import pytest

from patterning_dist.errors import PatterningError
from patterning_dist.experiments.two_rules.scores import (
    log_excess,
    mean_rows,
    reliability,
    reliability_between_solutions,
    shuffled_kinds,
    standardised,
    toward_first,
    winsorised,
)

CLASSES = np.repeat([1.0, 0.0], [300, 700])


def solutions(rng: np.random.Generator, number: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Responses of `number` solutions of either kind around a known contrast."""
    truth = rng.normal(size=len(CLASSES))
    kinds = np.repeat([1, 0], number)
    responses = np.where(kinds[:, None] == 1, truth, -truth) / 2 + noise * rng.normal(size=(2 * number, len(CLASSES)))
    return responses, kinds, truth


def test_mean_rows_are_means_over_the_solutions_of_a_kind() -> None:
    responses, kinds, _ = solutions(np.random.default_rng(0), 5, 1.0)
    rows = mean_rows(responses, kinds)
    assert rows == pytest.approx(np.stack([responses[:5].mean(axis=0), responses[5:].mean(axis=0)]))


def test_one_solution_of_a_kind_is_no_mean() -> None:
    with pytest.raises(PatterningError, match="1 and 2 solutions of the two kinds, expected at least two of each"):
        mean_rows(np.zeros((3, 4)), np.array([1, 0, 0]))


def test_winsorised_cuts_each_class_at_its_own_quantiles() -> None:
    scores = np.concatenate([np.arange(300.0), 1000 + np.arange(700.0)])
    cut = winsorised(scores, CLASSES, 0.1)
    for label in (1.0, 0.0):
        here = label == CLASSES
        low, high = np.quantile(scores[here], [0.1, 0.9])
        assert (cut[here].min(), cut[here].max()) == (low, high)
        inside = here & (scores > low) & (scores < high)
        assert (cut[inside] == scores[inside]).all()
    assert (winsorised(scores, CLASSES, 0.0) == scores).all()


def test_standardised_within_classes() -> None:
    scores = standardised(np.random.default_rng(1).normal(3 * CLASSES, 1 + CLASSES), CLASSES)
    for label in (1.0, 0.0):
        here = scores[label == CLASSES]
        assert (here.mean(), here.std()) == pytest.approx((0, 1))
    assert not standardised(np.ones(1000), CLASSES).any(), "no spread, no score"


@pytest.mark.parametrize("number", [2, 5, 6])
def test_shuffled_kinds_have_half_of_each_kind_wrong(number: int) -> None:
    kinds = np.repeat([1, 0], number)
    seen = set()
    for seed in range(20):
        shuffled = shuffled_kinds(np.random.default_rng(seed), kinds)
        assert (shuffled[:number] == 0).sum() == (shuffled[number:] == 1).sum() == number // 2
        seen.add(tuple(shuffled))
    assert len(seen) > 1


def test_reliability_is_what_the_noise_leaves() -> None:
    """Halves of k solutions of either kind: signal variance 1, noise variance 2 s^2 / k, so r = 1 / (1 + 2 s^2 / k)."""
    responses, kinds, _ = solutions(np.random.default_rng(2), 8, 1.5)
    expected = 1 / (1 + 2 * 1.5**2 / 4)
    # Standard error of one correlation over 1,000 strings: (1 - r^2) / sqrt(1000); halvings are not independent.
    assert reliability_between_solutions(responses, kinds, CLASSES) == pytest.approx(expected, abs=5 * 0.024)
    noise = np.random.default_rng(3).normal(size=(2, len(CLASSES)))
    assert abs(reliability((noise[0], noise[1]), CLASSES)) < 5 / np.sqrt(len(CLASSES))


def test_toward_first_raises_what_solutions_of_kind_one_lose_less_on() -> None:
    rng = np.random.default_rng(3)
    responses, kinds, truth = solutions(rng, 4, 0.0)
    # Samples are hard or easy for both kinds; some solutions are worse at all of them, or less sure of all of a class.
    excess = np.exp(responses + rng.normal(size=len(CLASSES)) + rng.normal(size=(len(kinds), 1)))
    sure = np.exp(rng.normal(size=(len(kinds), 2)))[:, CLASSES.astype(int)]
    score = toward_first(excess + sure, kinds, CLASSES, 0.0)
    # Not 1: the least of a class has no excess at all.
    assert reliability((score, -truth), CLASSES) > 0.97
    assert toward_first(excess + sure, 1 - kinds, CLASSES, 0.0) == pytest.approx(-score)
    for label in (0, 1):
        assert score[label == CLASSES].mean() == pytest.approx(0, abs=1e-12)
        assert score[label == CLASSES].std() == pytest.approx(1)


def test_log_excess_knows_no_floor_of_a_class() -> None:
    losses = np.array([[0.2, 0.3, 1.0, 1.5]])
    classes = np.array([1, 1, 0, 0])
    found = log_excess(losses, classes)
    assert found == pytest.approx(np.log([[1e-4, 0.1001, 1e-4, 0.5001]]))
    assert log_excess(losses + np.array([3, 3, 7, 7]), classes) == pytest.approx(found)
