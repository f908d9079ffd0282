"""Gaussian posteriors of quadratic losses, with everything in closed form, and samplers run on many of them at once.

l_i(w) = 1/2 (w - a_i)^T H_i (w - a_i), L their mean, P = n_beta H + gamma I. Rows of a position [row, coordinate] are
independent chains, so that Monte-Carlo errors are those of independent numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import solve_discrete_lyapunov

from patterning_dist.response.moments import CoMoments
from patterning_dist.sampling.posterior import Posterior


class Problem:
    """Samples with correlated Hessians, localised at a center that is not the optimum of their mean.

    Args:
        dimension, inverse_temperature, localization: of the posterior.
        stiffness: eps * (largest eigenvalue of P), which sets the step size of ``sgld`` and ``sgnht``.
        pull: how far the center is from the optimum, in units of the scale of the optima.
        scatter: if given, 2 d samples with the same Hessian, whose gradients differ from the mean by sqrt(d) * scatter
            along one coordinate: minibatch noise of covariance scatter^2 / batch size * I, whatever w.
    """

    def __init__(
        self,
        dimension,
        inverse_temperature,
        localization,
        stiffness,
        *,
        num_samples=5,
        pull=1.0,
        scatter=None,
        seed=0,
    ):
        rng = np.random.default_rng([seed, dimension])
        self.dimension, self.posterior = dimension, Posterior(inverse_temperature, localization)
        self.same_hessian = scatter is not None
        if not self.same_hessian:
            roots = rng.normal(size=(num_samples, dimension, dimension))
            self.hessians = roots @ roots.transpose(0, 2, 1) / dimension + 0.2 * np.eye(dimension)
            self.optima = rng.normal(size=(num_samples, dimension))
        else:
            root = rng.normal(size=(dimension, dimension))
            hessian = root @ root.T / dimension + 0.2 * np.eye(dimension)
            shifts = scatter * np.sqrt(dimension) * np.concatenate([np.eye(dimension), -np.eye(dimension)])
            self.hessians = np.repeat(hessian[None], 2 * dimension, axis=0)
            self.optima = rng.normal(size=dimension) + shifts @ np.linalg.inv(hessian)
        self.hessian = self.hessians.mean(axis=0)
        linear = np.einsum("ide,ie->d", self.hessians, self.optima) / len(self.optima)
        self.optimum = np.linalg.solve(self.hessian, linear)
        self.center = self.optimum + pull * rng.normal(size=dimension)
        self.precision = inverse_temperature * self.hessian + localization * np.eye(dimension)
        self.covariance = np.linalg.inv(self.precision)
        self.mean = self.covariance @ (inverse_temperature * linear + localization * self.center)
        self.step_size = stiffness / np.linalg.eigvalsh(self.precision).max()

    def recursion_covariance(self, step_size, preconditioner=None, score_variance=0.0):
        """Stationary covariance of w <- w - eps/2 G (P (w - m) + noise) + sqrt(eps G) xi, G diagonal."""
        scale = np.ones(self.dimension) if preconditioner is None else preconditioner
        transition = np.eye(self.dimension) - step_size / 2 * scale[:, None] * self.precision
        return solve_discrete_lyapunov(
            transition, np.diag(step_size * scale + step_size**2 / 4 * scale**2 * score_variance)
        )

    def mixing_steps(self, tolerance, step_size, preconditioner=None):
        """Steps of that recursion after which what is left of the start is below ``tolerance``."""
        scale = np.ones(self.dimension) if preconditioner is None else preconditioner
        transition = np.eye(self.dimension) - step_size / 2 * scale[:, None] * self.precision
        return int(np.ceil(np.log(tolerance) / np.log(np.abs(np.linalg.eigvals(transition)).max())))

    def losses(self, w):
        """l_i(w) - l_i(w*) [..., sample]."""

        def absolute(w):
            away = w[..., None, :] - self.optima
            return 0.5 * np.einsum("...id,ide,...ie->...i", away, self.hessians, away)

        return absolute(w) - absolute(self.center)

    def chi(self, covariance=None):
        """-Cov(l_j, l_i - L) = -( 1/2 tr(H_j S H_i S) + g_j^T S g_i ) less its mean over i, g_i = H_i (m - a_i)."""
        covariance = self.covariance if covariance is None else covariance
        spread = self.hessians @ covariance
        gradients = np.einsum("ide,ie->id", self.hessians, self.mean - self.optima)
        exact = 0.5 * np.einsum("iab,jba->ij", spread, spread) + gradients @ covariance @ gradients.T
        return -(exact - exact.mean(axis=1, keepdims=True))

    def llc(self, covariance=None):
        """n_beta E[L(w) - L(w*)]."""
        covariance = self.covariance if covariance is None else covariance
        expected = self.losses(self.mean).mean() + 0.5 * np.trace(self.hessian @ covariance)
        return self.posterior.inverse_temperature * expected


class Walk:
    """A sampler that walks on all rows at once.

    Args:
        problem: its posterior, its samples.
        module: of the sampler.
        num_rows: independent chains.
        seed: of the noise and the minibatches.
        step_size: eps; default: of the problem.
        batch_size: samples a minibatch, drawn for each row alone; default: the full gradient.
        options: what else a step takes.
    """

    def __init__(self, problem, module, num_rows, seed, *, step_size=None, batch_size=None, **options):
        self.problem, self.module, self.batch_size, self.options = problem, module, batch_size, options
        self.step_size = problem.step_size if step_size is None else step_size
        self.generator = torch.Generator().manual_seed(seed)
        self.center = {"w": torch.from_numpy(problem.center).expand(num_rows, -1)}
        self.state = module.init({"w": self.center["w"].clone()})
        self.hessians, self.optima = torch.from_numpy(problem.hessians), torch.from_numpy(problem.optima)
        self.hessian, self.optimum = torch.from_numpy(problem.hessian), torch.from_numpy(problem.optimum)

    @property
    def position(self):
        return self.state.position["w"].numpy()

    def gradient(self, w):
        if self.batch_size is None:
            return (w - self.optimum) @ self.hessian
        ids = torch.randint(len(self.optima), (len(w), self.batch_size), generator=self.generator)
        if self.problem.same_hessian:
            return (w - self.optima[ids].mean(dim=1)) @ self.hessian
        away = w[:, None] - self.optima[ids]
        return torch.einsum("rbde,rbe->rd", self.hessians[ids], away) / self.batch_size

    def advance(self, num_steps):
        """Take steps, in place."""
        for _ in range(num_steps):
            w = self.state.position["w"]
            self.state = self.module.step_(
                self.state,
                {"w": self.gradient(w)},
                {"w": torch.randn(w.shape, generator=self.generator, dtype=w.dtype)},
                center=self.center,
                posterior=self.problem.posterior,
                step_size=self.step_size,
                **self.options,
            )
        return self

    def record(self, num_draws, steps_between_draws):
        """Draws of the losses [row draw sample]."""
        draws = []
        for _ in range(num_draws):
            draws.append(self.problem.losses(self.advance(steps_between_draws).position))
        return np.stack(draws, axis=1)


def scores(draws, mean, covariance):
    """z-scores of the sample mean and of every entry of the sample covariance of independent Gaussian draws."""
    num = len(draws)
    variance = np.diag(covariance)
    z_mean = (draws.mean(axis=0) - mean) / np.sqrt(variance / num)
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / num)
    return z_mean, (np.cov(draws.T) - covariance) / error


def comoments(losses, num_observables=2):
    """Co-moments of chains [chain draw sample] whose observables are the losses of the first samples."""
    chains = []
    for chain, deviations in enumerate(losses):
        moments = CoMoments.empty(chain, len(deviations), num_observables, deviations.shape[1])
        moments.update(deviations[:, :num_observables], deviations)
        chains.append(moments)
    return chains
