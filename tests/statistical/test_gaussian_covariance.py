"""On Gaussian posteriors chi is known exactly: the estimate must agree, and its intervals must cover.

For l_i = 1/2 (w - a_i)^T H_i (w - a_i) and w ~ N(m, S): Cov(l_i, l_j) = 1/2 tr(H_i S H_j S) + g_i^T S g_j,
g_i = H_i (m - a_i).
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import lfilter

from patterning_dist.response.moments import CoMoments
from patterning_dist.response.susceptibility import susceptibility

DIMENSION, SAMPLES, OBSERVABLES = 3, 6, 2
INVERSE_TEMPERATURE, LOCALIZATION = 23.0, 5.0


class Posterior:
    """Losses of SAMPLES samples and the posterior of their mean around w* = center."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        roots = rng.normal(size=(SAMPLES, DIMENSION, DIMENSION))
        self.hessians = roots @ roots.transpose(0, 2, 1) / DIMENSION
        self.optima = rng.normal(size=(SAMPLES, DIMENSION))
        center = rng.normal(size=DIMENSION)
        hessian = self.hessians.mean(0)
        precision = INVERSE_TEMPERATURE * hessian + LOCALIZATION * np.eye(DIMENSION)
        pull = INVERSE_TEMPERATURE * np.einsum("ijk,ik->j", self.hessians, self.optima) / SAMPLES
        self.covariance = np.linalg.inv(precision)
        self.mean = self.covariance @ (pull + LOCALIZATION * center)
        self.at_center = self.losses(center)

    def losses(self, w):
        away = w[..., None, :] - self.optima
        return 0.5 * np.einsum("...id,ide,...ie->...i", away, self.hessians, away)

    def chi(self):
        """-Cov(l_j, l_i - L) for observables phi = l_j, j < OBSERVABLES."""
        spread = self.hessians @ self.covariance
        gradients = np.einsum("ide,ie->id", self.hessians, self.mean - self.optima)
        covariance = 0.5 * np.einsum("iab,jba->ij", spread, spread)
        covariance += gradients @ self.covariance @ gradients.T
        return -(covariance - covariance.mean(axis=1, keepdims=True))[:OBSERVABLES]

    def draws(self, rng, num_chains, num_draws, autocorrelation):
        noise = rng.normal(size=(num_chains, num_draws, DIMENSION))
        noise[:, 1:] *= np.sqrt(1 - autocorrelation**2)  # the first draw is stationary already
        noise = lfilter([1.0], [1.0, -autocorrelation], noise, axis=1)
        return self.mean + noise @ np.linalg.cholesky(self.covariance).T

    def estimate(self, rng, num_chains=4, num_draws=400, autocorrelation=0.0):
        chains = []
        for chain, w in enumerate(self.draws(rng, num_chains, num_draws, autocorrelation)):
            deviations = self.losses(w) - self.at_center
            moments = CoMoments.empty(chain, num_draws, OBSERVABLES, SAMPLES)
            moments.update(deviations[:, :OBSERVABLES], deviations)
            chains.append(moments)
        return susceptibility(chains)


@pytest.mark.parametrize("seed", range(3))
def test_chi_equals_the_closed_form_within_its_errors(seed):
    posterior = Posterior(seed)
    got = posterior.estimate(np.random.default_rng(100 + seed), num_chains=8, num_draws=20_000)
    z = (got.chi - posterior.chi()) / got.standard_error
    assert np.abs(z).max() < 4.5
    # The errors are small against chi itself, so agreement within them says something.
    assert np.median(got.standard_error / np.abs(posterior.chi())) < 0.03
    np.testing.assert_allclose(got.chi.sum(axis=1), 0, atol=1e-15)


@pytest.mark.parametrize(("autocorrelation", "num_draws"), [(0.0, 400), (0.8, 1500)])
def test_z_scores_and_coverage(autocorrelation, num_draws):
    posterior, rng = Posterior(10), np.random.default_rng(11)
    truth, scores, batch_scores = posterior.chi(), [], []
    for _ in range(240):
        got = posterior.estimate(rng, num_draws=num_draws, autocorrelation=autocorrelation)
        scores.append((got.chi - truth) / got.standard_error)
        batch_scores.append((got.chi - truth) / got.standard_error_batch)
    covered = np.abs(scores) < 1.96
    assert 0.90 < covered.mean() < 0.99
    assert covered.mean(axis=0).min() > 0.90
    assert covered.mean(axis=0).max() < 0.995
    # The larger of two errors is conservative; batch means alone should be right.
    assert 0.6 < np.mean(np.square(scores)) < 1.1
    assert 0.85 < np.mean(np.square(batch_scores)) < 1.3
    assert np.abs(np.mean(scores, axis=0)).max() < 4.5 / np.sqrt(240)
