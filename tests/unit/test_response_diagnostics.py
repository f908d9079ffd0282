"""Diagnostics must agree with ArviZ on the same draws."""

from __future__ import annotations

import numpy as np
import pytest
from arviz_stats.base import array_stats
from scipy.signal import lfilter

from patterning_dist.errors import PatterningError
from patterning_dist.response.diagnostics import observable_diagnostics, split_rhat
from patterning_dist.response.moments import CoMoments


def chain_of(losses, chain=0, num_draws=None, num_batches=4):
    moments = CoMoments.empty(chain, num_draws or len(losses), 1, losses.shape[1], num_batches)
    moments.update(losses[:, :1], losses)
    return moments


@pytest.mark.parametrize(("num_chains", "num_draws", "num_batches"), [(2, 16, 2), (3, 60, 4), (4, 96, 8), (7, 40, 10)])
def test_split_rhat_equals_arviz_entry_by_entry(num_chains, num_draws, num_batches):
    rng = np.random.default_rng(num_chains)
    time = np.linspace(-1, 1, num_draws)[:, None]
    # From chains that agree to chains that do not, each with no drift, a common one and a drift of its own.
    apart, drift = np.meshgrid(np.geomspace(1e-3, 3, 40), [0.0, 0.5, 3.0])
    apart, drift = apart.ravel(), drift.ravel()
    losses = rng.normal(size=(num_chains, num_draws, 120)) + apart * rng.normal(size=(num_chains, 1, 120))
    losses += time * drift * np.where(np.arange(120) % 2, 1.0, rng.normal(size=(num_chains, 1, 120)))
    losses = 1e-3 * np.cumsum(losses, axis=1) ** 2 if num_chains == 7 else losses  # skewed, autocorrelated
    got = split_rhat([chain_of(one, index, num_batches=num_batches) for index, one in enumerate(losses)])
    wanted = array_stats.rhat(losses.transpose(2, 0, 1), method="split")
    np.testing.assert_allclose(got, wanted, rtol=1e-10)
    assert got.max() > 1.5
    assert got.min() < 1.5


def test_split_rhat_of_an_odd_number_of_draws():
    # ArviZ leaves the middle draw out; here it belongs to a half, so that no draw is lost.
    rng = np.random.default_rng(6)
    losses = rng.normal(size=(3, 101, 40)) + np.linspace(0, 1, 40) * rng.normal(size=(3, 1, 40))
    got = split_rhat([chain_of(one, index) for index, one in enumerate(losses)])
    np.testing.assert_allclose(got, array_stats.rhat(losses.transpose(2, 0, 1), method="split"), rtol=0.02)


def test_split_rhat_of_one_chain_sees_drift():
    rng = np.random.default_rng(1)
    losses = rng.normal(size=(200, 2))
    losses[:, 1] += np.linspace(0, 5, 200)
    got = split_rhat([chain_of(losses)])
    assert got[0] < 1.05
    assert got[1] > 1.3


def test_split_rhat_is_undefined_for_a_constant_and_needs_draws():
    assert np.isnan(split_rhat([chain_of(np.zeros((8, 1)))])[0])
    with pytest.raises(PatterningError, match="expected at least 4 draws a chain"):
        split_rhat([chain_of(np.zeros((3, 1)), num_draws=8)])


def test_observable_diagnostics_equal_arviz():
    rng = np.random.default_rng(2)
    trace = np.cumsum(rng.normal(size=(3, 100)), axis=1) * 0.2
    got = observable_diagnostics({"loss": trace, "fixed": np.ones((3, 100))})
    assert got["loss"]["rhat"] == pytest.approx(float(array_stats.rhat(trace, method="rank")))
    assert got["loss"]["ess_bulk"] == pytest.approx(float(array_stats.ess(trace, method="bulk")))
    assert got["loss"]["mcse"] == pytest.approx(float(array_stats.mcse(trace, method="mean")))
    assert got["loss"]["mean"] == pytest.approx(trace.mean())
    assert got["loss"]["standard_deviation"] == pytest.approx(trace.std(ddof=1))
    assert got["loss"]["rhat"] > 1.1
    assert np.isnan(got["fixed"]["rhat"])
    assert np.isnan(got["fixed"]["ess_bulk"])
    assert got["fixed"]["mcse"] == 0
    assert np.isnan(got["fixed"]["autocorrelation"])
    assert np.isnan(got["fixed"]["autocorrelation_time"])


def test_autocorrelation_of_every_observable():
    rng = np.random.default_rng(7)
    coefficients = {"fast": 0.0, "slow": 0.9, "alternating": -0.5}
    traces = {}
    for name, coefficient in coefficients.items():
        noise = rng.normal(size=(4, 20_000)) * np.sqrt(1 - coefficient**2)
        traces[name] = lfilter([1.0], [1.0, -coefficient], noise, axis=1)
    got = observable_diagnostics(traces)
    for name, coefficient in coefficients.items():
        assert got[name]["autocorrelation"] == pytest.approx(coefficient, abs=0.02)
        assert got[name]["autocorrelation_time"] == pytest.approx((1 + coefficient) / (1 - coefficient), rel=0.1)
    slow = traces["slow"][:1]
    one = observable_diagnostics({"slow": slow})["slow"]
    assert one["autocorrelation"] == pytest.approx(float(array_stats.autocorr(slow, axis=1)[0, 1]))
    assert one["autocorrelation_time"] == pytest.approx(20_000 / float(array_stats.ess(slow, method="mean")))
    # Chains that disagree count as few draws, and neighbours are correlated no more than before.
    apart = observable_diagnostics({"fast": traces["fast"] + np.arange(4)[:, None]})["fast"]
    assert apart["autocorrelation"] == pytest.approx(got["fast"]["autocorrelation"])
    assert apart["autocorrelation_time"] > 1000


def test_one_chain_has_no_rhat_but_an_error():
    got = observable_diagnostics({"loss": np.random.default_rng(3).normal(size=(1, 400))})["loss"]
    assert np.isnan(got["rhat"])
    assert got["mcse"] == pytest.approx(1 / 20, rel=0.3)


def test_bad_traces_are_named():
    trace = np.zeros((2, 10))
    trace[1, 3] = np.nan
    with pytest.raises(PatterningError, match="gap: row 1, draw 3 is nan"):
        observable_diagnostics({"gap": trace})
    with pytest.raises(PatterningError, match=r"gap: trace of shape \(2, 3\), expected \[chain, draw\]"):
        observable_diagnostics({"gap": trace[:, :3]})
