"""Correlations and their intervals, against SciPy and against data that repeat."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import pearsonr

from patterning_dist.errors import PatterningError
from patterning_dist.response.reliability import (
    bootstrap_correlation,
    bootstrap_slope,
    reliability_from_sums,
    split_half_reliability,
    split_half_sums,
)


def noisy_chi(num_chains, noise, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, 4000)) + noise * rng.normal(size=(num_chains, 2, 4000))


def test_two_chains_give_their_correlation():
    chi = noisy_chi(2, 1.0)
    wanted = [np.corrcoef(chi[0, row], chi[1, row])[0, 1] for row in range(2)]
    np.testing.assert_allclose(split_half_reliability(chi), wanted, rtol=1e-12)


def test_four_chains_average_their_three_splits():
    chi = noisy_chi(4, 2.0)
    wanted = []
    for pair, rest in (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))):
        wanted.append(np.corrcoef(chi[list(pair), 0].mean(0), chi[list(rest), 0].mean(0))[0, 1])
    assert split_half_reliability(chi)[0] == pytest.approx(np.mean(wanted), rel=1e-12)


@pytest.mark.parametrize(("num_chains", "sizes"), [(5, (2, 3)), (8, (4, 4))])
def test_reliability_is_signal_over_signal_and_noise_of_a_half(num_chains, sizes):
    chi = noisy_chi(num_chains, 2.0)
    expected = 1 / np.sqrt((1 + 4 / sizes[0]) * (1 + 4 / sizes[1]))
    np.testing.assert_allclose(split_half_reliability(chi), expected, atol=0.04)
    np.testing.assert_array_equal(split_half_reliability(chi), split_half_reliability(chi))


def test_reliability_is_undefined_for_one_chain_and_for_constant_rows():
    assert np.isnan(split_half_reliability(noisy_chi(1, 1.0))).all()
    chi = noisy_chi(4, 1.0)
    chi[:, 1] = 3.0
    result = split_half_reliability(chi)
    assert np.isfinite(result[0])
    assert np.isnan(result[1])


@pytest.mark.parametrize("num_chains", [1, 2, 5, 8])
def test_sums_over_parts_of_the_probe_add_up_to_the_reliability_of_the_whole(num_chains):
    """Rows of chi sum to zero over the probe: a part's own mean must not be taken out."""
    chi = noisy_chi(num_chains, 1.0)
    chi += np.linspace(-2, 2, chi.shape[-1])  # parts differ in their means
    edges = [0, 0, 1, 900, 900, 2500, 4000]
    parts = [chi[:, :, start:stop] for start, stop in pairwise(edges)]
    got = reliability_from_sums(sum(split_half_sums(part) for part in parts))
    wanted = split_half_reliability(chi)
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
    if num_chains > 1:
        means = np.mean([split_half_reliability(part) for part in parts if part.shape[-1] > 1], axis=0)
        assert np.abs(means - wanted).min() > 0.05  # which is another number


def test_bootstrap_over_groups_widens_by_the_group_size():
    rng = np.random.default_rng(4)
    size, num_groups = 25, 80
    a, b = rng.normal(size=(2, num_groups))
    a, b = np.repeat(a, size), np.repeat(a + b, size)  # every token of a sequence says the same
    groups = np.repeat(np.arange(num_groups) * 7 + 3, size)
    got = bootstrap_correlation(a, b, groups, seed=1)
    assert got == bootstrap_correlation(a, b, groups, seed=1)
    assert got.low < got.value < got.high
    exact = pearsonr(a[::size], b[::size])
    truth = exact.confidence_interval()
    assert got.value == pytest.approx(exact.statistic, rel=1e-12)
    assert (got.high - got.low) / (truth.high - truth.low) == pytest.approx(1, abs=0.25)
    as_if_independent = bootstrap_correlation(a, b, np.arange(len(a)), seed=1)
    assert (got.high - got.low) / (as_if_independent.high - as_if_independent.low) > 3.5


def test_bootstrap_resample_is_a_correlation_of_the_resampled_rows():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 40)) + 1e4
    groups = np.arange(40) // 4
    chosen = np.random.default_rng(0).integers(10, size=10)
    rows = np.concatenate([np.flatnonzero(groups == group) for group in chosen])
    got = bootstrap_correlation(a, b, groups, seed=0, num_resamples=1)
    assert got.low == pytest.approx(np.corrcoef(a[rows], b[rows])[0, 1], rel=1e-9)


def test_the_slope_finds_the_factor_of_what_is_not_noisy():
    rng = np.random.default_rng(6)
    b, groups = rng.normal(size=4000) + 50, np.arange(4000) // 20
    found = [bootstrap_slope(1.4 * b + 3 * rng.normal(size=4000), b, groups, seed=0) for _ in range(30)]
    error = 3 / 4000**0.5
    assert np.mean([slope.value for slope in found]) == pytest.approx(1.4, abs=4 * error / 30**0.5)
    assert np.median([slope.high - slope.low for slope in found]) == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert sum(slope.low <= 1.4 <= slope.high for slope in found) >= 25  # of 28.5: below it in 1 of 100


def test_unusable_input_is_named_or_undefined():
    assert np.isnan(bootstrap_correlation([1.0, 2, 4], [1.0, 3, 2], [5, 5, 5], seed=0).low)
    assert np.isnan(bootstrap_correlation([1.0, 1, 1], [1.0, 3, 2], [5, 6, 7], seed=0).value)
    with pytest.raises(PatterningError, match=r"\(2,\) groups for \(3,\) samples"):
        bootstrap_correlation([1.0, 2, 4], [1.0, 3, 2], [5, 5], seed=0)
    with pytest.raises(PatterningError, match="expected two vectors of one length"):
        bootstrap_correlation([1.0, 2], [1.0, 2, 3], [5, 6], seed=0)
