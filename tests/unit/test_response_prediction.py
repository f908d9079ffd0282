"""Predictions with errors; the naive one is optimistic, the cross-fitted one is not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from patterning_dist.errors import PatterningError
from patterning_dist.response.prediction import cross_fitted_response, predicted_response_with_error

TEMPERATURE = 20.0


def test_prediction_is_the_mean_over_chains_with_a_t_interval():
    rng = np.random.default_rng(0)
    chi, weights = rng.normal(size=(5, 2, 30)), rng.uniform(0.5, 1.5, size=30)
    got = predicted_response_with_error(chi, weights, TEMPERATURE, level=0.9)
    per_chain = TEMPERATURE / 30 * chi @ (weights / weights.mean() - 1)
    np.testing.assert_allclose(got.value, per_chain.mean(0), rtol=1e-12)
    interval = ttest_1samp(per_chain, 0.0).confidence_interval(0.9)
    np.testing.assert_allclose(got.interval.T, [interval.low, interval.high], rtol=1e-10)
    scaled = predicted_response_with_error(chi, 7 * weights, TEMPERATURE)
    np.testing.assert_allclose(scaled.value, got.value, rtol=1e-10)


def test_one_chain_has_no_error():
    chi = np.random.default_rng(1).normal(size=(1, 2, 30))
    assert np.isnan(predicted_response_with_error(chi, np.arange(1.0, 31), TEMPERATURE).interval).all()
    with pytest.raises(PatterningError, match="with 2 chains"):
        cross_fitted_response(chi, lambda c: np.ones(30), TEMPERATURE)
    with pytest.raises(PatterningError, match=r"chi \(1, 2, 30\) and \(3,\) weights"):
        predicted_response_with_error(chi, np.ones(3), TEMPERATURE)


def test_each_chain_is_predicted_without_itself():
    rng = np.random.default_rng(2)
    chi = rng.normal(size=(5, 1, 12))
    seen = []

    def solve(half):
        seen.append(half)
        return 1 + 0.1 * half[0]

    got = cross_fitted_response(chi, solve, TEMPERATURE)
    np.testing.assert_allclose(seen[0], chi[[0, 2, 4]].mean(0))
    np.testing.assert_allclose(seen[1], chi[[1, 3]].mean(0))
    first = predicted_response_with_error(chi[[1, 3]], solve(chi[[0, 2, 4]].mean(0)), TEMPERATURE).per_chain
    second = predicted_response_with_error(chi[[0, 2, 4]], solve(chi[[1, 3]].mean(0)), TEMPERATURE).per_chain
    np.testing.assert_allclose(got.per_chain[[1, 3]], first)
    np.testing.assert_allclose(got.per_chain[[0, 2, 4]], second)
    np.testing.assert_allclose(got.value, got.per_chain.mean(0))


def test_naive_is_optimistic_and_cross_fitting_is_unbiased():
    rng = np.random.default_rng(3)
    num_samples, num_chains, repetitions = 200, 4, 300
    truth = rng.normal(size=(1, num_samples))
    truth -= truth.mean()
    naive, fitted, real = [], [], []

    def solve(chi):
        chi = chi - chi.mean(axis=1, keepdims=True)
        return 1 + np.linalg.pinv(TEMPERATURE / chi.shape[1] * chi) @ [1.0]

    for _ in range(repetitions):
        chi = truth + 3 * rng.normal(size=(num_chains, 1, num_samples))
        naive.append(predicted_response_with_error(chi, solve(chi.mean(0)), TEMPERATURE).value[0])
        fitted.append(cross_fitted_response(chi, solve, TEMPERATURE).value[0])
        halves = [TEMPERATURE / num_samples * truth[0] @ (solve(chi[h::2].mean(0)) - 1) for h in (0, 1)]
        real.append(np.mean(halves))
    np.testing.assert_allclose(naive, 1.0, rtol=1e-9)  # by construction, however noisy chi is
    difference = np.subtract(fitted, real)
    assert np.mean(real) < 0.3
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(repetitions)


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_cross_fitted_interval_covers_whatever_the_noise(noise):
    rng = np.random.default_rng(4)
    truth = rng.normal(size=(1, 100))
    truth -= truth.mean()

    def solve(chi):
        chi = chi - chi.mean(axis=1, keepdims=True)
        return 1 + np.linalg.pinv(TEMPERATURE / chi.shape[1] * chi) @ [1.0]

    covered = []
    for _ in range(300):
        chi = truth + noise * rng.normal(size=(6, 1, 100))
        low, high = cross_fitted_response(chi, solve, TEMPERATURE).interval[0]
        halves = [TEMPERATURE / 100 * truth[0] @ (solve(chi[h::2].mean(0)) - 1) for h in (0, 1)]
        covered.append(low < np.mean(halves) < high)
    assert 0.92 < np.mean(covered) <= 1


def test_two_chains_cross_fit_without_an_interval():
    chi = np.random.default_rng(5).normal(size=(2, 1, 12))
    got = cross_fitted_response(chi, lambda half: 1 + 0.1 * half[0], TEMPERATURE)
    assert np.isfinite(got.value).all()
    assert np.isnan(got.standard_error).all()
    assert np.isnan(got.interval).all()
