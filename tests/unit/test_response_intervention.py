"""With bounds that no weight meets, the solver must be the unbounded inverse, written out with dense matrices."""

from __future__ import annotations

import numpy as np
import pytest

from patterning_dist.errors import PatterningError
from patterning_dist.response.solver import solve_weights

TEMPERATURE = 12.0


def problem(seed=0):
    rng = np.random.default_rng(seed)
    chi = rng.normal(size=(3, 40)) * np.array([[5.0], [1.0], [0.2]])
    return chi - chi.mean(axis=1, keepdims=True), rng.normal(size=3)


def unbounded_intervention(chi, target, **options):
    return solve_weights(chi, target, weight_min=-1e6, weight_max=1e6, **options).weights - 1


def respond(chi, h):
    return TEMPERATURE / chi.shape[1] * chi @ h


def test_minimum_norm_meets_the_target_and_is_the_pseudo_inverse():
    chi, target = problem()
    h = unbounded_intervention(chi, target, inverse_temperature=TEMPERATURE)
    np.testing.assert_allclose(respond(chi, h), target, rtol=1e-10)
    np.testing.assert_allclose(h, np.linalg.pinv(TEMPERATURE / 40 * chi) @ target, atol=1e-10)
    assert abs(h.sum()) < 1e-10
    shards = [chi[:, :7].astype(np.float64), chi[:, 7:]]
    again = unbounded_intervention(shards, target, inverse_temperature=TEMPERATURE)
    np.testing.assert_allclose(again, h, rtol=1e-9, atol=1e-12)


def test_ridge_is_its_formula():
    chi, target = problem(1)
    h = unbounded_intervention(chi, target, inverse_temperature=TEMPERATURE, method="ridge", ridge=3.0)
    wanted = 40 / TEMPERATURE * chi.T @ np.linalg.solve(chi @ chi.T + 3.0 * np.eye(3), target)
    np.testing.assert_allclose(h, wanted, rtol=1e-9, atol=1e-12)


def test_truncated_and_mode_use_singular_directions():
    chi, target = problem(2)
    left, values, right = np.linalg.svd(chi, full_matrices=False)
    options = {"inverse_temperature": TEMPERATURE}
    h = unbounded_intervention(chi, target, method="truncated", rank=2, **options)
    wanted = 40 / TEMPERATURE * right[:2].T @ (left[:, :2].T @ target / values[:2])
    np.testing.assert_allclose(h, wanted, rtol=1e-9, atol=1e-12)
    for mode in range(3):
        direction = left[:, mode]
        h = unbounded_intervention(chi, direction, method="mode", mode=mode, **options)
        np.testing.assert_allclose(np.abs(h), 40 / TEMPERATURE / values[mode] * np.abs(right[mode]), rtol=1e-8)
        np.testing.assert_allclose(respond(chi, h), direction, atol=1e-10)


def test_bad_options_are_named():
    chi, target = problem(3)
    for options, text in (
        ({"method": "svd"}, "method: got 'svd'"),
        ({"method": "ridge"}, "method 'ridge': expected its own option only"),
        ({"ridge": 1.0}, "method 'minimum_norm': expected its own option only"),
        ({"method": "ridge", "ridge": 0.0}, "ridge: got 0.0, expected a number above 0"),
        ({"method": "truncated", "rank": 4}, "rank: got 4, expected 1 to 3"),
        ({"method": "mode", "mode": -1}, "mode: got -1, expected 0 to 2"),
    ):
        with pytest.raises(PatterningError, match=text):
            unbounded_intervention(chi, target, inverse_temperature=1.0, **options)
    for bad_chi, bad_target, temperature, text in (
        (chi, target[:2], 1.0, "expected 3 finite numbers, one for each observable"),
        (chi * np.nan, target, 1.0, "chi: has an entry that is not finite"),
        (chi * 0, target, 1.0, "no row varies over samples"),
        (chi, target, 0.0, "inverse_temperature: got 0.0"),
        ([chi, chi[:2]], target, 1.0, "column shards of it with the same observables"),
    ):
        with pytest.raises(PatterningError, match=text):
            unbounded_intervention(bad_chi, bad_target, inverse_temperature=temperature)
