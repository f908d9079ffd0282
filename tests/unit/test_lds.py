"""LDS and QLD against closed forms, and their intervals against simulated truths."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from patterning_dist.response.lds import (
    ceiling,
    linear_datamodeling_score,
    mean_over_queries,
    removed_sums,
    strongest,
)

NUM_SUBSETS, NUM_QUERIES = 40, 20


def test_scores_of_a_linear_model_predict_its_retrainings_exactly() -> None:
    """One step of gradient descent on queries that are linear in w: every loss is a sum over the samples."""
    rng = np.random.default_rng(0)
    gradients, queries = rng.normal(size=(50, 4)), rng.normal(size=(6, 4))
    scores = -0.3 * queries @ gradients.T
    removed = [np.sort(rng.permutation(50)[:20]) for _ in range(12)]
    kept = [np.setdiff1d(np.arange(50), ids) for ids in removed]
    losses = np.stack([-0.3 * queries @ gradients[ids].sum(axis=0) for ids in kept])
    everything = -0.3 * queries @ gradients.sum(axis=0)
    predicted = removed_sums(scores, removed)
    np.testing.assert_allclose(predicted, everything - losses, atol=1e-12)
    found = linear_datamodeling_score(predicted, everything - losses, np.arange(6))
    assert found.value == pytest.approx(1, abs=1e-12) and found.interval == pytest.approx((1, 1), abs=1e-9)
    # What is signed as influence instead predicts the opposite.
    assert linear_datamodeling_score(-predicted, everything - losses, np.arange(6)).value == pytest.approx(-1)


def test_the_value_is_the_mean_of_spearmans_correlations() -> None:
    rng = np.random.default_rng(1)
    predicted, measured = rng.normal(size=(2, 9, 5))
    predicted = predicted.round(0)  # ties
    found = linear_datamodeling_score(predicted, measured, np.arange(5))
    expected = [spearmanr(predicted[:, q], measured[:, q]).statistic for q in range(5)]
    np.testing.assert_allclose(found.per_query, expected, atol=1e-12)
    assert found.value == pytest.approx(np.mean(expected))


def test_scores_that_are_the_same_for_all_samples_predict_nothing() -> None:
    measured = np.random.default_rng(2).normal(size=(9, 3))
    found = linear_datamodeling_score(np.ones((9, 3)), measured, np.arange(3))
    assert found.value == 0 and found.interval == (0, 0)


def simulate(rng: np.random.Generator, correlations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normal pairs of a correlation for every query, which share half of what the subsets do to them."""
    shared, own, noise = (rng.normal(size=(NUM_SUBSETS, size)) for size in (1, NUM_QUERIES, NUM_QUERIES))
    predicted = (shared + own) / 2**0.5
    return predicted, correlations * predicted + np.sqrt(1 - correlations**2) * noise


def test_intervals_cover_the_truth_of_other_subsets_and_queries() -> None:
    """Spearman's correlation of a normal pair is 6 / pi asin(r / 2); 200 banks, each of 40 subsets, 20 queries."""
    rng, centre, width, hits, of_subsets = np.random.default_rng(3), 0.3, 0.2, 0, 0
    grid = np.linspace(centre - width, centre + width, 2001)
    truth = np.mean(6 / np.pi * np.arcsin(grid / 2))
    for _ in range(200):
        correlations = rng.uniform(centre - width, centre + width, NUM_QUERIES)
        found = linear_datamodeling_score(*simulate(rng, correlations), np.arange(NUM_QUERIES))
        hits += found.interval[0] < truth < found.interval[1]
        assert found.over_subsets is not None
        of_these = np.mean(6 / np.pi * np.arcsin(correlations / 2))
        of_subsets += found.over_subsets[0] < of_these < found.over_subsets[1]
    error = (0.95 * 0.05 / 200) ** 0.5
    # Resampling rows and columns at once counts their joint noise twice: intervals are rather too wide.
    assert hits / 200 > 0.95 - 3 * error
    assert of_subsets / 200 > 0.95 - 4 * error


def test_intervals_of_random_scores_cover_zero() -> None:
    """Of 100 tables of random scores, all on losses of their own, 5 intervals leave out 0 by chance."""
    rng, zero = np.random.default_rng(4), np.zeros(NUM_QUERIES)
    missed = 0
    for _ in range(100):
        predicted, measured = rng.normal(size=(NUM_SUBSETS, NUM_QUERIES)), simulate(rng, zero)[0]
        low, high = linear_datamodeling_score(predicted, measured, np.arange(NUM_QUERIES)).interval
        missed += not low < 0 < high
    assert missed <= 5 + 3 * (100 * 0.05 * 0.95) ** 0.5


def test_queries_of_one_document_count_as_one() -> None:
    """The interval of five documents of four alike queries is that of five queries."""
    changes = np.random.default_rng(5).normal(size=5)
    apart = mean_over_queries(changes, np.arange(5))
    together = mean_over_queries(np.repeat(changes, 4), np.repeat(np.arange(5), 4))
    assert together.value == pytest.approx(apart.value)
    assert together.interval == pytest.approx(apart.interval)
    assert mean_over_queries(np.repeat(changes, 4), np.arange(20)).interval[0] > apart.interval[0]


def test_interval_of_a_mean_over_queries_is_that_of_its_standard_error() -> None:
    changes = np.random.default_rng(6).normal(size=400)
    low, high = mean_over_queries(changes, np.arange(400)).interval
    # Ends of 4,000 resamples have a standard error of 2.7 % of the width.
    assert high - low == pytest.approx(2 * 1.96 * changes.std() / 20, rel=0.1)


def test_what_helps_most_has_the_lowest_scores() -> None:
    scores = np.array([3.0, -2.0, 0.0, -5.0, 1.0])
    assert strongest(scores, 0.4).tolist() == [1, 3]
    assert strongest(scores, 0.01).tolist() == [3]  # one at least


def test_the_ceiling_is_what_the_expected_loss_would_have() -> None:
    """Losses of two seeds, each the expected one and as much noise: halves agree by 1/2, the mean by root 2/3."""
    rng = np.random.default_rng(7)
    expected = rng.normal(size=(4000, 1))
    seeds = expected + rng.normal(size=(4000, 2))
    agreement = float(np.corrcoef(seeds.T)[0, 1])
    found = ceiling(agreement)
    assert found == pytest.approx(np.corrcoef(expected[:, 0], seeds.mean(axis=1))[0, 1], abs=4 / 4000**0.5)
    assert ceiling(-0.1) is None


def test_a_single_subset_has_no_correlation() -> None:
    with pytest.raises(ValueError, match="two subsets"):
        linear_datamodeling_score(np.ones((1, 3)), np.ones((1, 3)), np.arange(3))
