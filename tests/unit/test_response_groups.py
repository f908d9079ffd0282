"""Weights that keep the mass of every group are those of the quadratic program that says so: cvxpy is the oracle."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
from scipy.optimize import linprog

from patterning_dist.errors import PatterningError
from patterning_dist.response.grouped import multipliers
from patterning_dist.response.solver import (
    largest_feasible_strength,
    solve_for_effective_sample_share,
    solve_weights,
)

TEMPERATURE = 30.0
BOUNDS = {"inverse_temperature": TEMPERATURE, "weight_min": 0.1, "weight_max": 3.5}


def problem(seed, num_observables=2, num_samples=80, num_groups=7):
    """Observables of different units, groups of different sizes and means, one with a single member."""
    rng = np.random.default_rng(seed)
    groups = np.where(rng.random(num_samples) < 0.4, 0, rng.integers(0, num_groups - 1, num_samples))
    groups[0] = num_groups - 1
    chi = (
        rng.standard_t(4, size=(num_observables, num_samples))
        + rng.normal(size=(num_observables, num_groups))[:, groups]
    )
    chi *= 10.0 ** rng.integers(-4, 3, size=(num_observables, 1))
    chi -= chi.mean(axis=1, keepdims=True)
    return chi, rng.normal(size=num_observables) * TEMPERATURE * chi.std(axis=1), 3 * groups - 5


def indicators(groups):
    return (np.unique(groups)[:, None] == groups).astype(float)


def oracle(chi, target, groups, objective=None, rows=None):
    """min 1/2 |h|^2 within BOUNDS with group sums of zero, by an interior-point method; rows: constraints to keep."""
    rows = np.eye(len(chi)) if rows is None else rows
    matrix, wanted = rows @ chi, chi.shape[1] / TEMPERATURE * rows @ target
    scale = np.abs(matrix).max(axis=1)
    h = cp.Variable(chi.shape[1])
    constraints = [indicators(groups) @ h == 0, h >= BOUNDS["weight_min"] - 1, h <= BOUNDS["weight_max"] - 1]
    if objective is None:
        objective = cp.sum_squares(h) / 2
        constraints.append((matrix / scale[:, None]) @ h == wanted / scale)
    else:
        objective = objective(h)
    cp.Problem(cp.Minimize(objective), constraints).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
    )
    return h.value


def largest_by_linear_program(chi, target, groups):
    num_samples, scale = chi.shape[1], np.abs(chi).max(axis=1)
    equal = np.vstack([chi / scale[:, None], indicators(groups)])
    column = np.append(-num_samples / TEMPERATURE * target / scale, np.zeros(len(equal) - len(chi)))
    bounds = [(BOUNDS["weight_min"] - 1, BOUNDS["weight_max"] - 1)] * num_samples + [(0, None)]
    cost = np.append(np.zeros(num_samples), -1.0)
    return linprog(cost, A_eq=np.column_stack([equal, column]), b_eq=np.zeros(len(equal)), bounds=bounds).x[-1]


@pytest.mark.parametrize("fraction", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("num_observables", [1, 2, 4])
def test_equals_the_interior_point_oracle(num_observables, fraction):
    chi, target, groups = problem(num_observables, num_observables)
    strength = fraction * largest_feasible_strength(chi, target, groups=groups, **BOUNDS)
    solution = solve_weights(chi, target, strength=strength, groups=groups, **BOUNDS)
    np.testing.assert_allclose(solution.weights - 1, oracle(chi, strength * target, groups), atol=2e-6)
    np.testing.assert_allclose(solution.predicted_response, strength * target, rtol=1e-9)
    assert solution.weights[0] == 1  # a group of one cannot move
    assert solution.residual < 1e-10
    assert fraction < 0.9 or solution.num_at_minimum > 0
    free = solve_weights(chi, target, strength=strength, **BOUNDS)
    assert np.abs(indicators(groups) @ (free.weights - 1)).max() > 0.1


@pytest.mark.parametrize("seed", range(12))
def test_largest_strength_equals_linear_programming(seed):
    rng = np.random.default_rng(seed)
    num_observables, num_groups = int(rng.integers(1, 4)), int(rng.integers(2, 12))
    chi, target, groups = problem(seed, num_observables, int(rng.integers(num_groups + 20, 90)), num_groups)
    got = largest_feasible_strength(chi, target, groups=groups, **BOUNDS)
    assert got == pytest.approx(largest_by_linear_program(chi, target, groups), rel=1e-6)
    solution = solve_weights(chi, target, strength=got, groups=groups, **BOUNDS)
    np.testing.assert_allclose(solution.predicted_response, got * target, rtol=1e-5)
    assert np.abs(indicators(groups) @ (solution.weights - 1)).max() < 1e-9
    assert solution.weights.min() >= BOUNDS["weight_min"]
    assert solution.weights.max() <= BOUNDS["weight_max"]
    with pytest.raises(
        PatterningError, match=rf"keep the mass of \d+ groups: the largest feasible strength is {got:.6g}"
    ):
        solve_weights(chi, target, strength=1.001 * got, groups=groups, **BOUNDS)


def test_one_group_of_all_is_no_group():
    chi, target, _ = problem(3, 3, 400)
    largest = largest_feasible_strength(chi, target, **BOUNDS)
    groups = np.full(400, 9)
    assert largest_feasible_strength(chi, target, groups=groups, **BOUNDS) == pytest.approx(largest, rel=3e-7)
    alone, together = (solve_weights(chi, target, strength=0.9 * largest, groups=g, **BOUNDS) for g in (None, groups))
    assert alone.num_at_minimum > 0
    np.testing.assert_allclose(alone.weights, together.weights, atol=1e-10)


def test_bounded_ridge_and_truncation_keep_the_masses_as_well():
    chi, target, groups = problem(6, 2)
    chi, target = chi / chi.std(axis=1, keepdims=True) * np.array([[3.0], [1.0]]), np.array([3.0, -2.0])
    ridge, strength = 25.0, 20.0
    wanted = chi.shape[1] / TEMPERATURE * strength * target
    objective = lambda h: cp.sum_squares(h) / 2 + cp.sum_squares(chi @ h - wanted) / (2 * ridge)  # noqa: E731
    solution = solve_weights(chi, target, strength=strength, method="ridge", ridge=ridge, groups=groups, **BOUNDS)
    np.testing.assert_allclose(solution.weights - 1, oracle(chi, target, groups, objective), atol=2e-6)
    assert solution.num_at_minimum > 0

    options = {"method": "truncated", "rank": 1, "groups": groups, **BOUNDS}
    strength = 0.8 * largest_feasible_strength(chi, target, **options)
    of_groups = indicators(groups)
    left = np.linalg.svd(chi - chi @ of_groups.T / of_groups.sum(axis=1) @ of_groups)[0][:, :1].T
    solution = solve_weights(chi, target, strength=strength, **options)
    assert solution.num_at_minimum > 0
    np.testing.assert_allclose(solution.weights - 1, oracle(chi, strength * target, groups, rows=left), atol=2e-6)


@pytest.mark.parametrize("share", [0.9, 0.75])
def test_strength_for_an_effective_sample_share(share):
    chi, target, groups = problem(12, 2, 500, 40)
    solution = solve_for_effective_sample_share(chi, target, share, groups=groups, **BOUNDS)
    assert solution.effective_sample_share == pytest.approx(share, rel=1e-7)
    again = solve_weights(chi, target, strength=solution.strength, groups=groups, **BOUNDS)
    np.testing.assert_allclose(again.weights, solution.weights, atol=1e-12)
    assert np.abs(indicators(groups) @ (solution.weights - 1)).max() < 1e-12
    with pytest.raises(PatterningError, match=r"smallest with weights in \[0.1, 3.5\] that keep the mass of 40 groups"):
        solve_for_effective_sample_share(chi, target, 0.01, groups=groups, **BOUNDS)


def test_order_shards_and_names_of_groups_do_not_matter():
    chi, target, groups = problem(8, 3, 300, 30)
    strength = 0.7 * largest_feasible_strength(chi, target, groups=groups, **BOUNDS)
    weights = solve_weights(chi, target, strength=strength, groups=groups, **BOUNDS).weights
    order = np.random.default_rng(0).permutation(300)
    permuted = solve_weights(chi[:, order], target, strength=strength, groups=-(10**9) * groups[order], **BOUNDS)
    np.testing.assert_allclose(permuted.weights, weights[order], atol=1e-10)
    shards = [chi[:, :1], chi[:, 1:120], chi[:, 120:]]
    sharded = solve_weights(shards, target, strength=strength, groups=groups, **BOUNDS)
    np.testing.assert_allclose(sharded.weights, weights, atol=1e-10)


def test_what_cannot_be_grouped_is_refused():
    chi, target, groups = problem(9)
    with pytest.raises(PatterningError, match=r"groups: got int64 of shape \[79\], expected 80 whole numbers"):
        solve_weights(chi, target, groups=groups[1:], **BOUNDS)
    with pytest.raises(PatterningError, match="groups: got float64 of shape"):
        solve_weights(chi, target, groups=groups * 1.0, **BOUNDS)
    with pytest.raises(PatterningError, match="groups: chi does not vary within any of them"):
        solve_weights(chi, target, groups=np.arange(80), **BOUNDS)
    between = np.vstack([chi[0], (groups > 0) / 3])  # a row that differs between groups only
    with pytest.raises(PatterningError, match="observables steady: their chi rows are linearly dependent"):
        solve_weights(between, target, groups=groups, observables=["moving", "steady"], **BOUNDS)


@pytest.mark.parametrize("scale", [1e-9, 0.5, 30.0, 1e7])
@pytest.mark.parametrize("high", [2.5, 1e5])
def test_multipliers_balance_every_group(scale, high):
    """Whatever the scores, and wherever the search begins."""
    rng = np.random.default_rng(1)
    labels = np.append(rng.integers(0, 300, 4000) // rng.integers(1, 9, 4000), np.arange(300))
    score = scale * rng.standard_t(2, size=4300)
    for start in (np.zeros(300), scale * rng.normal(size=300)):
        found = multipliers(score, labels, start, -0.9, high)[labels]
        h = np.clip(score + found, -0.9, high)
        # A value near a bound is rounded as its score and its multiplier are.
        rounding = 4e-16 * np.bincount(labels, np.abs(score) + np.abs(found) + np.abs(h))
        assert (np.abs(np.bincount(labels, h)) <= 4 * rounding).all()
        assert (h != 0).any()


def test_half_a_million_float32_columns():
    rng = np.random.default_rng(15)
    shards = [rng.standard_t(4, size=(2, 250_000)).astype(np.float32) for _ in range(2)]
    groups = (20_000 * rng.random(500_000) ** 3).astype(int)  # some large, most with a few members
    target = np.array([1.0, -0.5])
    largest = largest_feasible_strength(shards, target, groups=groups, **BOUNDS)
    solution = solve_weights(shards, target, strength=0.8 * largest, groups=groups, **BOUNDS)
    assert solution.num_iterations < 20
    np.testing.assert_allclose(solution.predicted_response, 0.8 * largest * target, rtol=1e-8)
    assert solution.num_at_minimum > 1000
    assert np.abs(np.bincount(groups, solution.weights - 1)).max() < 1e-9
