"""SGNHT on Gaussian posteriors: its law at any step size, with minibatch noise, in many and in few coordinates.

Rows of a position share one thermostat: they are the coordinates of one large component, as in real use. With many of
them the friction hardly scatters, a step is linear, and its stationary law is known in closed form.
"""

from __future__ import annotations

import numpy as np
import pytest
from gaussian_problem import Problem, Walk, comoments, scores
from scipy.linalg import solve_discrete_lyapunov
from scipy.optimize import brentq

from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.sampling import sgnht


def make_walk(problem, num_rows, seed, **options):
    return Walk(problem, sgnht, num_rows, seed, num_coordinates=num_rows * problem.dimension, **options)


def law(problem, diffusion, score_variance=0.0):
    """(friction, covariance of w, covariance of p) at which |p|^2 / d is 1: a step is linear at constant friction."""
    eps, d = problem.step_size, problem.dimension
    h, identity = np.sqrt(eps), np.eye(d)

    def stationary(friction):
        kept = np.exp(-friction)
        kick = h * (1 + kept) / 2
        transition = np.block(
            [
                [identity - h * kick * problem.precision, h * kept * identity],
                [-kick * problem.precision, kept * identity],
            ]
        )
        variance = -np.expm1(-2 * diffusion) + kick**2 * score_variance
        return solve_discrete_lyapunov(transition, variance * np.kron([[h * h, h], [h, 1.0]], identity))

    friction = brentq(lambda f: np.trace(stationary(f)[d:, d:]) / d - 1, 1e-3, 30)
    covariance = stationary(friction)
    return friction, covariance[:d, :d], covariance[d:, d:]


def closed_form(problem):
    """t (P - eps/4 P^2)^-1 with tr(covariance P) = d."""
    covariance = np.linalg.inv(problem.precision - problem.step_size / 4 * problem.precision @ problem.precision)
    return problem.dimension / np.trace(covariance @ problem.precision) * covariance


def settled(walk, problem, diffusion, tolerance=1e-4):
    """Past the start: like ``sgld`` or up to 2 / diffusion times sooner, and the thermostat's own time."""
    steps = problem.mixing_steps(tolerance, problem.step_size)
    return walk.advance(max(steps, int(40 / diffusion)))


# dimension, n_beta, gamma, eps * (largest eigenvalue of P), diffusion
CASES = [(2, 40.0, 0.7, 1.4, 0.1), (3, 7.0, 11.0, 1.6, 0.25), (5, 300.0, 90.0, 1.0, 0.05), (4, 2.5, 0.2, 1.2, 0.4)]


@pytest.mark.parametrize("case", CASES)
def test_the_stationary_law_is_the_closed_form_at_any_step(case):
    problem, diffusion = Problem(*case[:4]), case[4]
    walk = settled(make_walk(problem, 20_000, seed=1, diffusion=diffusion), problem, diffusion)
    friction, covariance, momentum = law(problem, diffusion)
    np.testing.assert_allclose(covariance, closed_form(problem), rtol=1e-8)
    assert np.trace(covariance @ problem.precision) == pytest.approx(problem.dimension, rel=1e-10)
    z_mean, z_covariance = scores(walk.position, problem.mean, covariance)
    assert np.abs(z_mean).max() < 4.5
    assert np.abs(z_covariance).max() < 4.5
    z_mean, z_covariance = scores(walk.state.momentum["w"].numpy(), np.zeros(problem.dimension), momentum)
    assert np.abs(z_mean).max() < 4.5
    assert np.abs(z_covariance).max() < 4.5
    # The same test can tell this law from that of small steps, and from that of SGLD.
    for other in (problem.covariance, problem.recursion_covariance(problem.step_size)):
        _, z_other = scores(walk.position, problem.mean, other)
        assert np.abs(z_other).max() > 8
    thermostat = np.mean([walk.advance(1).state.thermostat for _ in range(200)])
    assert diffusion + thermostat == pytest.approx(friction, rel=0.02)


def test_small_steps_give_the_posterior_and_a_friction_that_is_the_diffusion():
    problem = Problem(3, 40.0, 0.7, 0.02)
    walk = settled(make_walk(problem, 8000, seed=3, diffusion=0.15), problem, 0.15, tolerance=1e-2)
    z_mean, z_covariance = scores(walk.position, problem.mean, problem.covariance)
    assert np.abs(z_mean).max() < 4.5
    assert np.abs(z_covariance).max() < 4.5
    thermostat = np.mean([walk.advance(1).state.thermostat for _ in range(500)])
    assert abs(thermostat) < 0.01 * 0.15


def test_halving_the_step_halves_the_bias():
    num_rows, ratios = 40_000, []
    for stiffness in (1.0, 0.5):
        problem = Problem(3, 3.0, 1.0, stiffness)
        walk = settled(make_walk(problem, num_rows, seed=4, diffusion=0.2), problem, 0.2, tolerance=1e-3)
        # Along the eigenvectors of P the relative errors add up to zero: the largest eigenvalue has the largest.
        values, vectors = np.linalg.eigh(problem.precision)
        ratios.append(values * np.var((walk.position - problem.mean) @ vectors, axis=0) - 1)
    error = np.sqrt(2 / num_rows)
    assert np.abs(ratios[1]).max() > 8 * error
    bias = [ratio[-1] for ratio in ratios]
    ratio_error = bias[0] / bias[1] * np.hypot(error / bias[0], error / bias[1])
    exact = [_relative_error(Problem(3, 3.0, 1.0, stiffness)) for stiffness in (1.0, 0.5)]
    assert 1.9 < exact[0] / exact[1] < 2.4  # of first order in eps
    assert abs(bias[0] / bias[1] - exact[0] / exact[1]) < 4.5 * ratio_error


def _relative_error(problem):
    values, vectors = np.linalg.eigh(problem.precision)
    return values[-1] * (vectors.T @ closed_form(problem) @ vectors)[-1, -1] - 1


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_thermostat_absorbs_minibatch_noise(batch_size):
    problem, scatter, diffusion = Problem(3, 7.0, 2.0, 0.05, scatter=2.5), 2.5, 0.1
    score_variance = 7.0**2 * scatter**2 / batch_size
    walk = make_walk(problem, 12_000, seed=5, batch_size=batch_size, diffusion=diffusion)
    walk = settled(walk, problem, diffusion, tolerance=1e-2)
    friction, covariance, _ = law(problem, diffusion, score_variance)
    z_mean, z_covariance = scores(walk.position, problem.mean, covariance)
    assert np.abs(z_mean).max() < 4.5
    assert np.abs(z_covariance).max() < 4.5
    thermostat = np.mean([walk.advance(1).state.thermostat for _ in range(200)])
    assert diffusion + thermostat == pytest.approx(friction, rel=0.03)
    assert friction > 1.3 * diffusion
    # Against the posterior: SGNHT stays within its bias of order eps, SGLD is off by eps/4 of the score's variance.
    excess = np.trace(np.cov(walk.position.T) @ problem.precision) / 3 - 1
    of_sgld = (
        np.trace(problem.recursion_covariance(problem.step_size, None, score_variance) @ problem.precision) / 3 - 1
    )
    assert abs(excess) < 0.02
    assert of_sgld > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("diffusion", "stiffness"), [(0.1, 0.2), (0.05, 0.4)])
def test_few_coordinates(diffusion, stiffness):
    """A component of three coordinates, one chain: the friction scatters by diffusion / sqrt(3)."""
    problem = Problem(3, 9.0, 14.0, stiffness)
    walk = make_walk(problem, 1, seed=6, diffusion=diffusion).advance(1000)
    positions, thermostat = np.empty((40_000, 3)), np.empty(40_000)
    for t in range(len(positions)):
        positions[t] = walk.advance(1).position[0]
        thermostat[t] = walk.state.thermostat
    away = positions - problem.mean
    exact = closed_form(problem)
    products = np.einsum("ti,tj->tij", away, away).reshape(40, 1000, 3, 3).mean(axis=1)
    batches = away.reshape(40, 1000, 3).mean(axis=1)
    assert (np.abs(batches.mean(axis=0)) < 4.5 * batches.std(axis=0, ddof=1) / np.sqrt(40)).all()
    error = products.std(axis=0, ddof=1) / np.sqrt(40)
    assert (np.abs(products.mean(axis=0) - exact) < 4.5 * error).all()
    assert np.diag(error / exact).max() < 0.05
    assert thermostat.std() == pytest.approx(diffusion / np.sqrt(3), rel=0.25)


def test_chi_from_sgnht_draws_equals_the_closed_form():
    problem = Problem(3, 9.0, 14.0, 0.6, seed=7)
    walk = settled(make_walk(problem, 64, seed=8, diffusion=0.1), problem, 0.1)
    got = susceptibility(comoments(walk.record(1000, 3)))
    exact = problem.chi(closed_form(problem))[:2]
    z = (got.chi - exact) / got.standard_error
    assert np.abs(z).max() < 4.5
    assert np.median(got.standard_error / np.abs(exact)) < 0.05
