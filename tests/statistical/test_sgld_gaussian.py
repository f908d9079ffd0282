"""SGLD with full gradients on Gaussian posteriors, where the law of every step is known in closed form.

w <- A w + eps/2 (n_beta H a + gamma w*) + sqrt(eps) xi with A = I - eps/2 P, P = n_beta H + gamma I. Many independent
chains run as one batch, so that Monte-Carlo errors are those of independent numbers.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov

from patterning_dist.response.moments import CoMoments
from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.sampling import sgld
from patterning_dist.sampling.posterior import Posterior

# dimension, n_beta, gamma, eps * (largest eigenvalue of P)
CASES = [(2, 40.0, 0.7, 0.3), (3, 7.0, 11.0, 0.8), (5, 300.0, 90.0, 0.8), (4, 2.5, 0.2, 1.2)]


class Problem:
    """L(w) = 1/2 (w - a)^T H (w - a) with correlated H, localised at a center that is not the optimum."""

    def __init__(self, dimension, inverse_temperature, localization, stiffness, seed=0):
        rng = np.random.default_rng([seed, dimension])
        root = rng.normal(size=(dimension, dimension))
        self.hessian = root @ root.T / dimension + 0.2 * np.eye(dimension)
        self.optimum, self.center = rng.normal(size=dimension), rng.normal(size=dimension)
        self.posterior = Posterior(inverse_temperature, localization)
        self.precision = inverse_temperature * self.hessian + localization * np.eye(dimension)
        pull = inverse_temperature * self.hessian @ self.optimum + localization * self.center
        self.mean = np.linalg.solve(self.precision, pull)
        self.step_size = stiffness / np.linalg.eigvalsh(self.precision).max()

    @property
    def transition(self):
        return np.eye(len(self.mean)) - self.step_size / 2 * self.precision

    def stationary(self):
        return solve_discrete_lyapunov(self.transition, self.step_size * np.eye(len(self.mean)))

    def mixing_steps(self, tolerance):
        """Steps after which what is left of the start is below ``tolerance``."""
        slowest = np.abs(np.linalg.eigvalsh(self.transition)).max()
        return int(np.ceil(np.log(tolerance) / np.log(slowest)))

    def chains(self, num_chains, seed):
        """State and a function that advances it, all chains at once [chain, coordinate]."""
        generator = torch.Generator().manual_seed(seed)
        center = {"w": torch.from_numpy(self.center).expand(num_chains, -1)}
        hessian, optimum = torch.from_numpy(self.hessian), torch.from_numpy(self.optimum)

        def advance(state, num_steps):
            for _ in range(num_steps):
                w = state.position["w"]
                noise = {"w": torch.randn(w.shape, generator=generator, dtype=w.dtype)}
                gradient = {"w": (w - optimum) @ hessian}
                state = sgld.step(
                    state, gradient, noise, center=center, posterior=self.posterior, step_size=self.step_size
                )
            return state

        return sgld.init(center), advance


def scores(draws, mean, covariance):
    """z-scores of the sample mean and of every entry of the sample covariance of independent Gaussian draws."""
    num = len(draws)
    variance = np.diag(covariance)
    z_mean = (draws.mean(axis=0) - mean) / np.sqrt(variance / num)
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / num)
    return z_mean, (np.cov(draws.T) - covariance) / error


@pytest.mark.parametrize("case", CASES)
def test_the_stationary_law_is_the_one_of_the_recursion(case):
    problem = Problem(*case)
    state, advance = problem.chains(60_000, seed=1)
    draws = advance(state, problem.mixing_steps(1e-4)).position["w"].numpy()
    z_mean, z_covariance = scores(draws, problem.mean, problem.stationary())
    assert np.abs(z_mean).max() < 4.5
    assert np.abs(z_covariance).max() < 4.5
    # The same test can tell the recursion's law from the limit of small steps.
    _, z_limit = scores(draws, problem.mean, np.linalg.inv(problem.precision))
    assert np.abs(z_limit).max() > 8


def test_the_law_before_mixing():
    problem = Problem(*CASES[2])
    state, advance = problem.chains(60_000, seed=2)
    draws = advance(state, 4).position["w"].numpy()
    powers = [np.linalg.matrix_power(problem.transition, k) for k in range(5)]
    mean = problem.mean + powers[4] @ (problem.center - problem.mean)
    covariance = problem.step_size * sum(a @ a for a in powers[:4])
    z_mean, z_covariance = scores(draws, mean, covariance)
    assert np.abs(z_mean).max() < 4.5
    assert np.abs(z_covariance).max() < 4.5


@pytest.mark.parametrize("case", CASES[:2])
def test_small_steps_give_the_posterior(case):
    dimension, inverse_temperature, localization, _ = case
    problem = Problem(dimension, inverse_temperature, localization, 0.02)
    state, advance = problem.chains(3000, seed=3)
    draws = advance(state, problem.mixing_steps(1e-3)).position["w"].numpy()
    z_mean, z_covariance = scores(draws, problem.mean, np.linalg.inv(problem.precision))
    assert np.abs(z_mean).max() < 4.5
    assert np.abs(z_covariance).max() < 4.5


def test_halving_the_step_halves_the_bias():
    num_chains, bias, error = 100_000, [], []
    for stiffness in (0.4, 0.2):
        problem = Problem(4, 3.0, 14.0, stiffness)
        state, advance = problem.chains(num_chains, seed=4)
        draws = advance(state, problem.mixing_steps(1e-3)).position["w"].numpy()
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
    rng = np.random.default_rng(7)
    num_samples, dimension, num_chains, num_draws = 5, 3, 64, 1200
    roots = rng.normal(size=(num_samples, dimension, dimension))
    hessians = roots @ roots.transpose(0, 2, 1) / dimension
    optima = rng.normal(size=(num_samples, dimension))
    problem = Problem(dimension, inverse_temperature, localization, 0.6)
    # L is the mean of the samples' losses: the same gradient as one quadratic around its own optimum.
    problem.hessian = hessians.mean(axis=0)
    problem.optimum = np.linalg.solve(problem.hessian, np.einsum("ide,ie->d", hessians, optima) / num_samples)
    problem.precision = inverse_temperature * problem.hessian + localization * np.eye(dimension)
    problem.step_size = 0.6 / np.linalg.eigvalsh(problem.precision).max()
    pull = inverse_temperature * problem.hessian @ problem.optimum + localization * problem.center
    mean, covariance = np.linalg.solve(problem.precision, pull), problem.stationary()

    def losses(w):
        away = w[..., None, :] - optima
        return 0.5 * np.einsum("...id,ide,...ie->...i", away, hessians, away)

    state, advance = problem.chains(num_chains, seed=8)
    state = advance(state, problem.mixing_steps(1e-3))
    draws = []
    for _ in range(num_draws):
        state = advance(state, 3)
        draws.append(losses(state.position["w"].numpy()) - losses(problem.center))
    draws = np.stack(draws, axis=1)  # chain draw sample
    chains = []
    for chain, deviations in enumerate(draws):
        moments = CoMoments.empty(chain, num_draws, 2, num_samples)
        moments.update(deviations[:, :2], deviations)
        chains.append(moments)
    got = susceptibility(chains)

    spread = hessians @ covariance
    gradients = np.einsum("ide,ie->id", hessians, mean - optima)
    exact = 0.5 * np.einsum("iab,jba->ij", spread, spread) + gradients @ covariance @ gradients.T
    exact = -(exact - exact.mean(axis=1, keepdims=True))[:2]
    z = (got.chi - exact) / got.standard_error
    assert np.abs(z).max() < 4.5
    assert np.median(got.standard_error / np.abs(exact)) < 0.03
