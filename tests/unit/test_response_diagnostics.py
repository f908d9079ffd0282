"""Diagnostics must agree with ArviZ on the same draws, and the LLC with what is known exactly."""

from __future__ import annotations

import numpy as np
import pytest
from arviz_stats.base import array_stats

from patterning_dist.errors import PatterningError
from patterning_dist.response.diagnostics import healthy_chains, llc, observable_diagnostics, split_rhat
from patterning_dist.response.moments import CoMoments


def chain_of(losses, chain=0, num_draws=None):
    moments = CoMoments.empty(chain, num_draws or len(losses), 1, losses.shape[1], 4)
    moments.update(losses[:, :1], losses)
    return moments


def test_split_rhat_equals_arviz():
    rng = np.random.default_rng(0)
    losses = rng.normal(size=(3, 60, 5)) + np.linspace(0, 2, 5) * rng.normal(size=(3, 1, 5))
    losses[..., 4] += np.linspace(0, 3, 60)[:, None].T
    got = split_rhat([chain_of(one, index) for index, one in enumerate(losses)])
    wanted = array_stats.rhat(losses.transpose(2, 0, 1), method="split")
    np.testing.assert_allclose(got, wanted, rtol=1e-10)
    assert got[4] > 1.2


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


def test_health_is_all_draws_and_finite_moments():
    good, short, bad = (chain_of(np.ones((8, 2)), c, n) for c, n in ((0, 8), (1, 10), (2, 8)))
    bad.comoment[0, 0, 0] = np.inf
    healthy, excluded = healthy_chains([good, short, bad])
    assert healthy == [good]
    assert excluded == {1: "8 of 10 draws recorded", 2: "moments are not finite"}


def test_llc_of_a_regular_quadratic_is_half_its_dimension():
    # p ~ exp(-n_beta L), L = 1/2 w^T H w: n_beta L is half a chi-square with d degrees of freedom.
    rng = np.random.default_rng(4)
    dimension, inverse_temperature = 6, 37.0
    root = rng.normal(size=(dimension, dimension))
    hessian = root @ root.T + np.eye(dimension)
    factor = np.linalg.cholesky(np.linalg.inv(inverse_temperature * hessian))
    draws = rng.normal(size=(4, 2000, dimension)) @ factor.T
    losses = 0.5 * np.einsum("cti,ij,ctj->ct", draws, hessian, draws)
    losses[:, :50] = 99.0  # burn-in
    value, error = llc(losses, inverse_temperature, burn_in=50)
    assert abs(value - dimension / 2) < 4 * error
    assert error == pytest.approx(np.sqrt(dimension / 2 / (4 * 1950)), rel=0.8)


def test_llc_error_is_the_larger_of_within_and_between():
    rng = np.random.default_rng(5)
    losses = 0.01 * rng.normal(size=(4, 100)) + np.array([1.0, 2, 3, 4])[:, None]
    value, error = llc(losses, 10.0)
    assert value == pytest.approx(25, abs=0.1)
    assert error == pytest.approx(10 * np.std([1, 2, 3, 4], ddof=1) / 2, rel=0.01)
    assert llc(losses[:1], 10.0).standard_error == pytest.approx(10 * 0.01 / 10, rel=0.4)
    assert llc(np.ones((2, 10)), 10.0) == (10.0, 0.0)
