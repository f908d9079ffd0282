"""The LLC and its interval against what is known exactly."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import t as student

from patterning_dist.errors import PatterningError
from patterning_dist.response.batch_means import degrees_of_freedom
from patterning_dist.response.llc import llc


def autoregression(rng, num_chains, num_draws, coefficient):
    """Stationary AR(1), mean 0, variance 1. [chain, draw]"""
    noise = rng.normal(size=(num_chains, num_draws))
    noise[:, 1:] *= np.sqrt(1 - coefficient**2)
    return lfilter([1.0], [1.0, -coefficient], noise, axis=1)


def test_a_regular_quadratic_has_half_its_dimension():
    # p ~ exp(-n_beta L), L = 1/2 w^T H w: n_beta L is half a chi-square with d degrees of freedom.
    rng = np.random.default_rng(4)
    dimension, inverse_temperature = 6, 37.0
    root = rng.normal(size=(dimension, dimension))
    hessian = root @ root.T + np.eye(dimension)
    factor = np.linalg.cholesky(np.linalg.inv(inverse_temperature * hessian))
    draws = rng.normal(size=(4, 2000, dimension)) @ factor.T
    losses = 0.5 * np.einsum("cti,ij,ctj->ct", draws, hessian, draws)
    losses[:, :50] = 99.0  # burn-in
    found = llc(losses, inverse_temperature, burn_in=50)
    assert abs(found.value - dimension / 2) < 4 * found.standard_error
    assert found.standard_error == pytest.approx(np.sqrt(dimension / 2 / (4 * 1950)), rel=0.8)
    assert llc(losses, inverse_temperature).value > 10  # burn-in taken in


def test_the_error_is_the_larger_of_within_and_between():
    rng = np.random.default_rng(5)
    losses = 0.01 * rng.normal(size=(4, 100)) + np.array([1.0, 2, 3, 4])[:, None]
    found = llc(losses, 10.0)
    assert found.value == pytest.approx(25, abs=0.1)
    assert found.standard_error == pytest.approx(10 * np.std([1, 2, 3, 4], ddof=1) / 2, rel=0.01)
    assert found.degrees_of_freedom == pytest.approx(3, rel=0.01)
    low, high = found.interval(0.9)
    assert high - found.value == pytest.approx(student.ppf(0.95, 3) * found.standard_error, rel=0.01)
    assert found.value - low == pytest.approx(high - found.value)
    assert llc(losses[:1], 10.0).standard_error == pytest.approx(10 * 0.01 / 10, rel=0.4)
    assert llc(np.ones((2, 10)), 10.0)[:2] == (10.0, 0.0)
    assert llc(np.ones((2, 10)), 10.0).interval() == (10.0, 10.0)


def test_bad_traces_are_named():
    with pytest.raises(PatterningError, match=r"losses: trace of shape \(1, 3\), expected \[chain, draw\]"):
        llc(np.zeros((1, 10)), 1.0, burn_in=7)
    with pytest.raises(PatterningError, match="losses: row 0, draw 4 is inf; leave that chain out"):
        llc([[0.0] * 4 + [np.inf]], 1.0)


def test_degrees_of_freedom_follow_the_excess_between_chains():
    assert degrees_of_freedom(2.0, np.nan, 14, 1) == 14
    assert degrees_of_freedom(2.0, 1.0, 14, 2) == 14
    assert degrees_of_freedom(2.0, 200.0, 14, 2) == pytest.approx(1, rel=0.03)
    # Welch and Satterthwaite: (1 + 3)^2 / (1 / 14 + 9 / 1).
    assert degrees_of_freedom(1.0, 4.0, 14, 2) == pytest.approx(16 / (1 / 14 + 9))
    assert degrees_of_freedom(0.0, 0.0, 14, 3) == 14
    assert degrees_of_freedom(np.nan, 4.0, 1, 3) == 2
    # Squares of such variances would underflow.
    assert degrees_of_freedom(1e-200, 4e-200, 14, 2) == pytest.approx(16 / (1 / 14 + 9))


@pytest.mark.parametrize("num_chains", [1, 2, 4, 8])
@pytest.mark.parametrize(("coefficient", "num_draws"), [(0.0, 50), (0.5, 50), (0.9, 200), (0.95, 300)])
def test_intervals_cover_the_known_mean_of_correlated_draws(num_chains, coefficient, num_draws):
    # 8 to 50 autocorrelation times, (1 + a) / (1 - a) draws each, a chain.
    rng, inverse_temperature, repetitions, covered = np.random.default_rng([num_chains, num_draws]), 7.0, 300, 0
    for _ in range(repetitions):
        trace = 0.3 + 0.1 * autoregression(rng, num_chains, num_draws, coefficient)
        low, high = llc(trace, inverse_temperature).interval()
        covered += low < inverse_temperature * 0.3 < high
    assert 0.90 <= covered / repetitions <= 0.99


def test_a_normal_quantile_would_not_cover_with_few_chains():
    """What the interval is for: one or two chains, of an unknown spread."""
    rng, covered, wide = np.random.default_rng(0), [], []
    for _ in range(300):
        found = llc(autoregression(rng, 2, 20, 0.9), 1.0)  # two chains, two autocorrelation times in all
        low, high = found.interval()
        covered.append(abs(found.value) < 1.96 * found.standard_error)
        wide.append(low < 0 < high)
    assert np.mean(covered) < 0.85
    assert np.mean(wide) > 0.9
