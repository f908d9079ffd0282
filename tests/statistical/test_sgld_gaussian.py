"""SGLD on Gaussian posteriors, where the law of every step is known in closed form.

w <- A w + eps/2 (n_beta H a + gamma w*) + sqrt(eps) xi with A = I - eps/2 P, P = n_beta H + gamma I.
"""

from __future__ import annotations

import numpy as np
import pytest
from gaussian_problem import Problem, Walk, comoments, scores

from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.sampling import sgld

# dimension, n_beta, gamma, eps * (largest eigenvalue of P)
CASES = [(2, 40.0, 0.7, 0.3), (3, 7.0, 11.0, 0.8), (5, 300.0, 90.0, 0.8), (4, 2.5, 0.2, 1.2)]


@pytest.mark.parametrize("case", CASES)
def test_the_stationary_law_is_the_one_of_the_recursion(case):
    problem = Problem(*case)
    walk = Walk(problem, sgld, 60_000, seed=1)
    draws = walk.advance(problem.mixing_steps(1e-4, problem.step_size)).position
    z_mean, z_covariance = scores(draws, problem.mean, problem.recursion_covariance(problem.step_size))
    assert np.abs(z_mean).max() < 4.5
    assert np.abs(z_covariance).max() < 4.5
    # The same test can tell the recursion's law from the limit of small steps.
    _, z_limit = scores(draws, problem.mean, problem.covariance)
    assert np.abs(z_limit).max() > 8


def test_the_law_before_mixing():
    problem = Problem(*CASES[2])
    draws = Walk(problem, sgld, 60_000, seed=2).advance(4).position
    transition = np.eye(problem.dimension) - problem.step_size / 2 * problem.precision
    powers = [np.linalg.matrix_power(transition, k) for k in range(5)]
    mean = problem.mean + powers[4] @ (problem.center - problem.mean)
    covariance = problem.step_size * sum(a @ a for a in powers[:4])
    z_mean, z_covariance = scores(draws, mean, covariance)
    assert np.abs(z_mean).max() < 4.5
    assert np.abs(z_covariance).max() < 4.5


@pytest.mark.parametrize("batch_size", [1, 4])
def test_minibatches_add_their_variance(batch_size):
    # n_beta grad L_batch has variance n_beta^2 scatter^2 / batch size in every coordinate.
    problem = Problem(3, 7.0, 11.0, 0.5, scatter=0.9)
    walk = Walk(problem, sgld, 60_000, seed=5, batch_size=batch_size)
    draws = walk.advance(problem.mixing_steps(1e-4, problem.step_size)).position
    wanted = problem.recursion_covariance(problem.step_size, score_variance=7.0**2 * 0.9**2 / batch_size)
    z_mean, z_covariance = scores(draws, problem.mean, wanted)
    assert np.abs(z_mean).max() < 4.5
    assert np.abs(z_covariance).max() < 4.5
    _, z_full_batch = scores(draws, problem.mean, problem.recursion_covariance(problem.step_size))
    assert np.abs(z_full_batch).max() > 8


@pytest.mark.parametrize("case", CASES[:2])
def test_small_steps_give_the_posterior(case):
    problem = Problem(*case[:3], 0.02)
    draws = Walk(problem, sgld, 3000, seed=3).advance(problem.mixing_steps(1e-3, problem.step_size)).position
    z_mean, z_covariance = scores(draws, problem.mean, problem.covariance)
    assert np.abs(z_mean).max() < 4.5
    assert np.abs(z_covariance).max() < 4.5


def test_halving_the_step_halves_the_bias():
    num_chains, bias, error = 100_000, [], []
    for stiffness in (0.4, 0.2):
        problem = Problem(4, 3.0, 14.0, stiffness)
        walk = Walk(problem, sgld, num_chains, seed=4)
        draws = walk.advance(problem.mixing_steps(1e-3, problem.step_size)).position
        # tr(S P) / d - 1: the mean relative excess of the variance along the eigenvectors of P.
        bias.append(np.trace(np.cov(draws.T) @ problem.precision) / 4 - 1)
        error.append(np.sqrt(2 / (4 * num_chains)))
    assert bias[1] > 8 * error[1]
    ratio = bias[0] / bias[1]
    ratio_error = ratio * np.hypot(error[0] / bias[0], error[1] / bias[1])
    # Beyond first order the ratio is up to 2 (1 - 0.05) / (1 - 0.1).
    assert 2 - 3 * ratio_error < ratio < 2.12 + 3 * ratio_error


@pytest.mark.parametrize(("inverse_temperature", "localization"), [(23.0, 5.0), (3.0, 40.0)])
def test_chi_from_sgld_draws_equals_the_closed_form(inverse_temperature, localization):
    problem = Problem(3, inverse_temperature, localization, 0.6, seed=7)
    walk = Walk(problem, sgld, 64, seed=8).advance(problem.mixing_steps(1e-3, problem.step_size))
    got = susceptibility(comoments(walk.record(1200, 3)))
    exact = problem.chi(problem.recursion_covariance(problem.step_size))[:2]
    z = (got.chi - exact) / got.standard_error
    assert np.abs(z).max() < 4.5
    assert np.median(got.standard_error / np.abs(exact)) < 0.03
