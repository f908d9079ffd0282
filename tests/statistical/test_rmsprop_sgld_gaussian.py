"""RMSprop-SGLD on Gaussian posteriors: its law with the preconditioner at rest, and what a moving one does to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaussian_problem import Problem, Walk, comoments, scores
from scipy.integrate import quad

from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.sampling import rmsprop_sgld
from patterning_dist.sampling.posterior import Posterior

STABILITY = 0.07


def limit(problem, covariance=None, gradient_variance=0.0):
    """G once V is the mean of g^2 over the stationary law: the diagonal of H S H, the mean gradient, the minibatch."""
    covariance = problem.covariance if covariance is None else covariance
    mean_gradient = problem.hessian @ (problem.mean - problem.optimum)
    second_moment = np.diag(problem.hessian @ covariance @ problem.hessian) + mean_gradient**2 + gradient_variance
    return 1 / (np.sqrt(second_moment) + STABILITY)


def step_size(problem, scale, stiffness):
    """eps such that the largest eigenvalue of eps G P is ``stiffness``."""
    return stiffness / np.linalg.eigvals(scale[:, None] * problem.precision).real.max()


def excess(problem, covariance):
    """tr(S P) / d - 1: the mean relative excess of the variance along the eigenvectors of P."""
    return np.trace(covariance @ problem.precision) / problem.dimension - 1


# The preconditioner at rest


@pytest.mark.parametrize("case", [(2, 40.0, 0.7, 0.6), (3, 7.0, 11.0, 0.8), (5, 300.0, 90.0, 1.1)])
def test_the_law_with_a_frozen_preconditioner_is_that_of_the_recursion(case):
    problem = Problem(*case[:3], 1.0)
    scale = np.geomspace(0.4, 3.0, problem.dimension)
    eps = step_size(problem, scale, case[3])
    walk = Walk(problem, rmsprop_sgld, 20_000, seed=1, step_size=eps, decay=1.0, stability=STABILITY)
    # V such that G is ``scale``, after so many steps that no further one counts.
    second_moment = torch.from_numpy((1 / scale - STABILITY) ** 2).expand(20_000, -1).clone()
    walk.state = walk.state._replace(second_moment={"w": second_moment}, step=10**15)
    draws = walk.advance(problem.mixing_steps(1e-4, eps, scale)).position
    z_mean, z_covariance = scores(draws, problem.mean, problem.recursion_covariance(eps, scale))
    assert np.abs(z_mean).max() < 4.5
    assert np.abs(z_covariance).max() < 4.5
    _, z_limit = scores(draws, problem.mean, problem.covariance)
    assert np.abs(z_limit).max() > 8


def test_from_its_own_start_the_preconditioner_reaches_its_limit_and_the_bias_halves_with_the_step():
    num_chains, bias, error = 25_000, [], np.sqrt(2 / (3 * 25_000))
    for stiffness in (0.8, 0.4):
        # A center far off makes the mean gradient large: V hardly depends on where in the posterior the chain is.
        problem = Problem(3, 7.0, 11.0, 1.0, pull=4.0)
        scale = limit(problem)
        eps = step_size(problem, scale, stiffness)
        walk = Walk(problem, rmsprop_sgld, num_chains, seed=2, step_size=eps, decay=0.995, stability=STABILITY)
        draws = walk.advance(800).position
        second_moment = walk.state.second_moment["w"].numpy().mean(axis=0)
        exact = problem.recursion_covariance(eps, scale)
        np.testing.assert_allclose(1 / (np.sqrt(second_moment) + STABILITY), limit(problem, exact), rtol=0.01)
        z_mean, z_covariance = scores(draws, problem.mean, exact)
        assert np.abs(z_mean).max() < 4.5
        assert np.abs(z_covariance).max() < 4.5
        bias.append(excess(problem, np.cov(draws.T)))
        assert abs(bias[-1] - excess(problem, exact)) < 4.5 * error
    assert bias[1] > 8 * error
    # Of first order: 2, and up to 2 (1 - 0.1) / (1 - 0.2) beyond it.
    ratio_error = bias[0] / bias[1] * np.hypot(error / bias[0], error / bias[1])
    assert 2 - 3 * ratio_error < bias[0] / bias[1] < 2.25 + 3 * ratio_error


# The preconditioner that follows w


INVERSE_TEMPERATURE, LOCALIZATION, CURVATURE, OPTIMUM, CENTER, WIDE_STABILITY = 9.0, 2.5, 1.7, -0.4, 0.8, 0.3


def one_dimension(eps, correction):
    """Mean and variance of w over draws of many chains with decay 0, and their standard errors."""
    num_chains, num_steps = 4000, int(8 / eps)
    generator = torch.Generator().manual_seed(3)
    state = rmsprop_sgld.init({"w": torch.full((num_chains,), CENTER, dtype=torch.float64)})
    curvature = {"w": torch.full((num_chains,), CURVATURE, dtype=torch.float64)}
    sums, count = torch.zeros(2, num_chains, dtype=torch.float64), 0
    for step in range(num_steps):
        state = rmsprop_sgld.step_(
            state,
            {"w": CURVATURE * (state.position["w"] - OPTIMUM)},
            {"w": torch.randn(num_chains, generator=generator, dtype=torch.float64)},
            center={"w": torch.tensor(CENTER, dtype=torch.float64)},
            posterior=Posterior(INVERSE_TEMPERATURE, LOCALIZATION),
            step_size=eps,
            decay=0.0,
            stability=WIDE_STABILITY,
            correction=correction,
            curvature=curvature,
        )
        if step >= num_steps // 5:
            sums += torch.stack([state.position["w"], state.position["w"] ** 2])
            count += 1
    first, second = (sums / count).numpy()
    mean = first.mean()
    # Each chain's part in the mean and in the variance about the pooled mean.
    parts = np.stack([first, second - 2 * mean * first + mean**2])
    return parts.mean(axis=1), parts.std(axis=1) / np.sqrt(num_chains)


def law(with_scale):
    """Mean and variance of p(w) or of p(w) / G(w), by quadrature."""

    def density(w):
        log_p = -INVERSE_TEMPERATURE * CURVATURE / 2 * (w - OPTIMUM) ** 2 - LOCALIZATION / 2 * (w - CENTER) ** 2
        return np.exp(log_p) * ((abs(CURVATURE * (w - OPTIMUM)) + WIDE_STABILITY) if with_scale else 1.0)

    bounds = {"a": OPTIMUM - 4, "b": OPTIMUM + 4, "points": [OPTIMUM], "limit": 200}
    zeroth, first, second = (quad(lambda w, k=k: w**k * density(w), **bounds)[0] for k in range(3))
    return np.array([first / zeroth, second / zeroth - (first / zeroth) ** 2])


@pytest.mark.parametrize("correction", [False, True])
def test_without_memory_the_law_is_p_over_g_or_with_the_correction_p(correction):
    """One dimension, decay 0: G = 1 / (|h (w - a)| + stability) is a function of w alone."""
    (coarse, coarse_error), (fine, fine_error) = (one_dimension(eps, correction) for eps in (0.008, 0.004))
    # Both laws are those of the limit of small steps: extrapolate to it.
    at_zero, error = 2 * fine - coarse, np.hypot(2 * fine_error, coarse_error)
    z_plain, z_target = (at_zero - law(True)) / error, (at_zero - law(False)) / error
    right, wrong = (z_target, z_plain) if correction else (z_plain, z_target)
    assert np.abs(right).max() < 4.5
    assert np.abs(wrong).min() > 10


def relative_excess(problem, stiffness, *, decay, gradient_variance=0.0, num_steps=2500, **options):
    """How much larger the variance is than that of the recursion with G at its limit, averaged over snapshots."""
    scale = limit(problem, gradient_variance=gradient_variance)
    eps = step_size(problem, scale, stiffness)
    walk = Walk(
        problem, rmsprop_sgld, 3000, seed=4, step_size=eps, decay=decay, stability=STABILITY, **options
    ).advance(num_steps)
    snapshots = [np.cov(walk.advance(100).position.T) for _ in range(10)]
    score_variance = problem.posterior.inverse_temperature**2 * gradient_variance
    wanted = problem.recursion_covariance(eps, scale, score_variance)
    return (1 + excess(problem, np.mean(snapshots, axis=0))) / (1 + excess(problem, wanted)) - 1


def near_the_optimum(**changes):
    return Problem(3, 7.0, 1.0, 1.0, pull=0.3, **changes)


@pytest.mark.slow
def test_the_default_is_right_where_minibatch_noise_or_a_mean_gradient_dominates():
    # Measured within 0.6 % of the recursion with G at rest; 4.5 standard errors of this test are 2.5 %.
    noisy = near_the_optimum(scatter=1.5)
    assert abs(relative_excess(noisy, 0.1, decay=0.99, gradient_variance=1.5**2, batch_size=1)) < 0.025
    assert abs(relative_excess(Problem(3, 7.0, 11.0, 1.0, pull=4.0), 0.1, decay=0.99)) < 0.025


@pytest.mark.slow
def test_where_the_curvature_dominates_the_default_is_off_and_decay_one_is_not():
    """Full gradients near the optimum, some 80 steps to forget half of the start, memory of 100 steps: V follows w."""
    problem = near_the_optimum()
    default = relative_excess(problem, 0.05, decay=0.99)
    assert 0.10 < default < 0.25  # what the docstring warns of; 16 % measured
    # Gamma is of order 1 - decay: leaving it out is not what is wrong.
    curvature = {"w": torch.from_numpy(np.diag(problem.hessian).copy())}
    corrected = relative_excess(problem, 0.05, decay=0.99, correction=True, curvature=curvature)
    assert 0 < default - corrected < 0.02
    # Smaller steps do not help: the chain forgets more slowly, and V follows it all the better.
    assert relative_excess(problem, 0.2, decay=0.99) < default - 0.05
    assert abs(relative_excess(problem, 0.05, decay=1.0, num_steps=4000)) < 0.04


def test_chi_from_rmsprop_sgld_draws_equals_the_closed_form():
    problem = Problem(3, 9.0, 14.0, 1.0, pull=3.0, seed=7)
    scale = limit(problem)
    eps = step_size(problem, scale, 0.5)
    walk = Walk(problem, rmsprop_sgld, 64, seed=8, step_size=eps, decay=0.99, stability=STABILITY).advance(600)
    got = susceptibility(comoments(walk.record(1000, 3)))
    exact = problem.chi(problem.recursion_covariance(eps, scale))[:2]
    z = (got.chi - exact) / got.standard_error
    assert np.abs(z).max() < 4.5
    assert np.median(got.standard_error / np.abs(exact)) < 0.03
