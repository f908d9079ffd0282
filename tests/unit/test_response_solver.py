"""The bounded solver must be the quadratic program it claims to be: cvxpy and HiGHS are the oracles."""

from __future__ import annotations

import math

import cvxpy as cp
import numpy as np
import pytest
from scipy.optimize import linprog

from patterning_dist.errors import PatterningError
from patterning_dist.response.solver import (
    largest_feasible_strength,
    solve_for_effective_sample_share,
    solve_weights,
)

TEMPERATURE = 30.0
BOUNDS = {"inverse_temperature": TEMPERATURE, "weight_min": 0.1, "weight_max": 3.5}


def problem(seed, num_observables=2, num_samples=60):
    rng = np.random.default_rng(seed)
    chi = rng.standard_t(4, size=(num_observables, num_samples))
    chi *= 10.0 ** rng.integers(-4, 3, size=(num_observables, 1))  # observables of very different units
    chi -= chi.mean(axis=1, keepdims=True)
    return chi, rng.normal(size=num_observables) * TEMPERATURE * chi.std(axis=1)


def oracle(chi, target, objective=None, rows=None):
    """min 1/2 |h|^2 within BOUNDS, by an interior-point method; rows: constraints to keep (default: all)."""
    num_observables, num_samples = chi.shape
    rows = np.eye(num_observables) if rows is None else rows
    matrix, wanted = rows @ chi, num_samples / TEMPERATURE * rows @ target
    scale = np.abs(matrix).max(axis=1)
    h = cp.Variable(num_samples)
    constraints = [cp.sum(h) == 0, h >= BOUNDS["weight_min"] - 1, h <= BOUNDS["weight_max"] - 1]
    if objective is None:
        objective = cp.sum_squares(h) / 2
        constraints.append((matrix / scale[:, None]) @ h == wanted / scale)
    else:
        objective = objective(h)
    cp.Problem(cp.Minimize(objective), constraints).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
    )
    return h.value


def largest_by_linear_program(chi, target):
    num_observables, num_samples = chi.shape
    scale = np.abs(chi).max(axis=1)
    equal = np.zeros((num_observables + 1, num_samples + 1))
    equal[:-1, :-1] = chi / scale[:, None]
    equal[:-1, -1] = -num_samples / TEMPERATURE * target / scale
    equal[-1, :-1] = 1.0
    bounds = [(BOUNDS["weight_min"] - 1, BOUNDS["weight_max"] - 1)] * num_samples + [(0, None)]
    cost = np.append(np.zeros(num_samples), -1.0)
    return linprog(cost, A_eq=equal, b_eq=np.zeros(num_observables + 1), bounds=bounds).x[-1]


@pytest.mark.parametrize("fraction", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("num_observables", [1, 2, 4])
def test_equals_the_interior_point_oracle(num_observables, fraction):
    chi, target = problem(num_observables, num_observables)
    strength = fraction * largest_feasible_strength(chi, target, **BOUNDS)
    solution = solve_weights(chi, target, strength=strength, **BOUNDS)
    np.testing.assert_allclose(solution.weights - 1, oracle(chi, strength * target), atol=2e-6)
    np.testing.assert_allclose(solution.predicted_response, strength * target, rtol=1e-9)
    assert solution.residual < 1e-10


@pytest.mark.parametrize("seed", range(12))
def test_largest_strength_equals_linear_programming(seed):
    rng = np.random.default_rng(seed)
    num_observables = int(rng.integers(1, 4))
    chi, target = problem(seed, num_observables, int(rng.integers(num_observables + 2, 50)))
    got = largest_feasible_strength(chi, target, **BOUNDS)
    assert got == pytest.approx(largest_by_linear_program(chi, target), rel=1e-6)
    solution = solve_weights(chi, target, strength=got, **BOUNDS)
    np.testing.assert_allclose(solution.predicted_response, got * target, rtol=1e-5)
    assert solution.weights.min() >= BOUNDS["weight_min"]
    assert solution.weights.max() <= BOUNDS["weight_max"]


def test_optimality_conditions_hold():
    chi, target = problem(3, 3, 400)
    strength = 0.9 * largest_feasible_strength(chi, target, **BOUNDS)
    solution = solve_weights(chi, target, strength=strength, **BOUNDS)
    h = solution.weights - 1
    low, high = BOUNDS["weight_min"] - 1, BOUNDS["weight_max"] - 1
    at_low, at_high = solution.weights <= 0.1 + 1e-15, solution.weights >= 3.5 - 1e-15
    free = ~at_low & ~at_high
    assert at_low.any()
    assert at_high.any()
    assert (at_low.sum(), at_high.sum()) == (solution.num_at_minimum, solution.num_at_maximum)
    rows = np.vstack([chi / chi.std(axis=1, keepdims=True), np.ones(400)])
    dual, residual = np.linalg.lstsq(rows[:, free].T, h[free], rcond=None)[:2]
    assert residual[0] < 1e-18
    assert (rows[:, at_low].T @ dual <= low + 1e-9).all()
    assert (rows[:, at_high].T @ dual >= high - 1e-9).all()


def test_bounded_ridge_equals_the_oracle_and_knows_no_infeasible_strength():
    chi, target = problem(6, 2)
    chi, target = chi / chi.std(axis=1, keepdims=True), np.array([3.0, -2.0])
    ridge, strength = 25.0, 20.0
    wanted = len(chi[0]) / TEMPERATURE * strength * target
    objective = lambda h: cp.sum_squares(h) / 2 + cp.sum_squares(chi @ h - wanted) / (2 * ridge)  # noqa: E731
    solution = solve_weights(chi, target, strength=strength, method="ridge", ridge=ridge, **BOUNDS)
    np.testing.assert_allclose(solution.weights - 1, oracle(chi, target, objective), atol=2e-6)
    assert solution.num_at_minimum > 0
    assert math.isinf(solution.largest_feasible_strength)
    assert np.abs(solution.predicted_response).max() < strength * 3


def test_bounded_truncation_asks_only_for_the_leading_direction():
    chi, target = problem(7, 3)
    chi = chi / chi.std(axis=1, keepdims=True) * np.array([[3.0], [2.0], [1.0]])
    options = {"method": "truncated", "rank": 1, **BOUNDS}
    target = np.array([1.0, -1.0, 0.5])
    strength = 0.8 * largest_feasible_strength(chi, target, **options)
    left = np.linalg.svd(chi)[0][:, :1].T
    solution = solve_weights(chi, target, strength=strength, **options)
    assert solution.num_at_minimum > 0
    np.testing.assert_allclose(solution.weights - 1, oracle(chi, strength * target, rows=left), atol=2e-6)
    np.testing.assert_allclose(left @ solution.predicted_response, strength * left @ target, rtol=1e-9)


def test_weights_have_mean_one_to_rounding():
    for seed in range(5):
        chi, target = problem(seed, 2, 5000)
        strength = 0.97 * largest_feasible_strength(chi, target, **BOUNDS)
        solution = solve_weights(chi, target, strength=strength, **BOUNDS)
        assert math.fsum(solution.weights) == pytest.approx(5000, abs=1e-11 * 5000)


def test_order_shards_and_units_do_not_matter():
    chi, target = problem(8, 3, 300)
    chi += 5 * chi.std(axis=1, keepdims=True)  # a constant in a row is no response when weights keep their mean
    strength = 0.7 * largest_feasible_strength(chi, target, **BOUNDS)
    weights = solve_weights(chi, target, strength=strength, **BOUNDS).weights
    order = np.random.default_rng(0).permutation(300)
    permuted = solve_weights(chi[:, order], target, strength=strength, **BOUNDS).weights
    np.testing.assert_allclose(permuted, weights[order], atol=1e-10)
    shards = [chi[:, :1], chi[:, 1:120], chi[:, 120:]]
    np.testing.assert_allclose(solve_weights(shards, target, strength=strength, **BOUNDS).weights, weights, atol=1e-10)
    units = np.array([1e7, 1.0, 1e-9])
    rescaled = solve_weights(units[:, None] * chi, units * target, strength=strength, **BOUNDS)
    np.testing.assert_allclose(rescaled.weights, weights, atol=1e-9)
    warmer = solve_weights(chi, target, strength=2 * strength, **{**BOUNDS, "inverse_temperature": 60.0})
    np.testing.assert_allclose(warmer.weights, weights, atol=1e-10)


def test_infinite_maximum_is_the_bound_that_the_mean_implies():
    chi, target = problem(9, 1, 20)
    options = {"inverse_temperature": TEMPERATURE, "weight_min": 0.0}
    largest = largest_feasible_strength(chi, target, **options)
    peak = chi[0].max() if target[0] > 0 else -chi[0].min()
    assert largest == pytest.approx(TEMPERATURE * peak / abs(target[0]), rel=1e-6)  # all weight on one sample
    weights = solve_weights(chi, target, strength=largest, **options).weights
    assert weights.max() == pytest.approx(20, rel=1e-5)


def test_a_strength_out_of_reach_names_the_largest():
    chi, target = problem(10)
    largest = largest_feasible_strength(chi, target, **BOUNDS)
    with pytest.raises(PatterningError, match=rf"largest feasible strength is {largest:.6g}; lower"):
        solve_weights(chi, target, strength=1.001 * largest, **BOUNDS)
    with pytest.raises(PatterningError, match=r"weights in \[0.1, 3.5\]"):
        solve_weights(chi, target, strength=50 * largest, **BOUNDS)
    with pytest.raises(PatterningError, match="expected a number >= 0; turn the target round"):
        solve_weights(chi, target, strength=-1.0, **BOUNDS)


def test_dependent_observables_are_named_unless_the_target_agrees():
    chi, target = problem(11, 2)
    chi = np.vstack([chi, 2 * chi[0] - 3 * chi[1], np.full(60, 0.1)])
    consistent = np.append(target, [2 * target[0] - 3 * target[1], 0.0])
    names = ["induction", "copying", "mixed", "silent"]
    largest = largest_feasible_strength(chi, consistent, **BOUNDS)
    solution = solve_weights(chi, consistent, strength=largest / 2, observables=names, **BOUNDS)
    alone = solve_weights(chi[:2], target, strength=largest / 2, **BOUNDS)
    np.testing.assert_allclose(solution.weights, alone.weights, atol=1e-8)
    contradicting = consistent + np.array([0, 0, 1.0, 0]) * np.abs(consistent[2])
    with pytest.raises(PatterningError, match="observables induction, copying, mixed: their chi rows"):
        solve_weights(chi, contradicting, observables=names, **BOUNDS)
    with pytest.raises(PatterningError, match="observables silent: their chi rows are linearly dependent"):
        solve_weights(chi, consistent + np.array([0, 0, 0, 1.0]), observables=names, **BOUNDS)


@pytest.mark.parametrize("method", [{}, {"method": "ridge", "ridge": 1.0}])
@pytest.mark.parametrize("share", [0.9, 0.6])
def test_strength_for_an_effective_sample_share(share, method):
    chi, target = problem(12, 2, 500)
    chi, target = chi / chi.std(axis=1, keepdims=True), np.array([1.0, 2.0])
    solution = solve_for_effective_sample_share(chi, target, share, **method, **BOUNDS)
    assert solution.effective_sample_share == pytest.approx(share, rel=1e-7)
    rho = solution.weights
    assert rho.sum() ** 2 / (rho**2).sum() / 500 == pytest.approx(share, rel=1e-7)
    again = solve_weights(chi, target, strength=solution.strength, **method, **BOUNDS)
    np.testing.assert_allclose(again.weights, rho, atol=1e-12)
    assert solution.top_percent_share == pytest.approx(np.sort(rho)[-5:].sum() / 500)


def test_a_share_out_of_reach_names_the_smallest():
    chi, target = problem(13)
    top = solve_weights(chi, target, strength=largest_feasible_strength(chi, target, **BOUNDS), **BOUNDS)
    with pytest.raises(PatterningError, match=f"0.01 is below {top.effective_sample_share:.4g}"):
        solve_for_effective_sample_share(chi, target, 0.01, **BOUNDS)
    with pytest.raises(PatterningError, match=r"got 1.0, expected between 0 and 1"):
        solve_for_effective_sample_share(chi, target, 1.0, **BOUNDS)


def test_bad_bounds_and_targets_are_named():
    chi, target = problem(14)
    with pytest.raises(PatterningError, match=r"weight bounds: got \[1, 2\], expected weight_min < 1"):
        solve_weights(chi, target, inverse_temperature=1.0, weight_min=1, weight_max=2)
    with pytest.raises(PatterningError, match="asks for no response"):
        solve_weights(chi, 0 * target, inverse_temperature=1.0)


def test_half_a_million_float32_columns():
    rng = np.random.default_rng(15)
    shards = [rng.standard_t(4, size=(2, 250_000)).astype(np.float32) for _ in range(2)]
    target = np.array([1.0, -0.5])
    largest = largest_feasible_strength(shards, target, **BOUNDS)
    solution = solve_weights(shards, target, strength=0.8 * largest, **BOUNDS)
    assert solution.num_iterations < 20
    np.testing.assert_allclose(solution.predicted_response, 0.8 * largest * target, rtol=1e-8)
    assert solution.num_at_minimum > 1000
    assert abs(solution.weights.mean() - 1) < 1e-12
