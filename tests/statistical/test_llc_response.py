"""How lambda and the free energy answer to sample weights, on quadratic losses, where both are closed form in rho.

l_i = 1/2 (w - a_i)^T H_i (w - a_i); p(w) ~ exp(-n_beta L_rho(w) - gamma/2 |w - w*|^2) is Gaussian for any weights rho,
so lambda(rho) = n_beta (E[L_rho] - L_rho(w*)) and F(rho) can be differenced at will.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import lfilter

from patterning_dist.errors import PatterningError
from patterning_dist.response.llc import free_energy_response, llc, llc_response
from patterning_dist.response.moments import CoMoments
from patterning_dist.response.susceptibility import susceptibility

DIMENSION, SAMPLES = 3, 6


class Problem:
    """SAMPLES quadratic losses. With `at_minimum`, w* is the minimum of their mean."""

    def __init__(self, seed, inverse_temperature, localization, at_minimum=True):
        rng = np.random.default_rng(seed)
        roots = rng.normal(size=(SAMPLES, DIMENSION, DIMENSION))
        self.hessians = roots @ roots.transpose(0, 2, 1) / DIMENSION + 0.1 * np.eye(DIMENSION)
        self.optima = rng.normal(size=(SAMPLES, DIMENSION)) / np.sqrt(inverse_temperature)
        self.inverse_temperature, self.localization = inverse_temperature, localization
        self.center = rng.normal(size=DIMENSION) / np.sqrt(inverse_temperature)
        if at_minimum:
            pull = np.einsum("ide,ie->d", self.hessians, self.optima)
            self.center = np.linalg.solve(self.hessians.sum(0), pull)
        self.at_center = self.losses(self.center)

    def losses(self, w):
        away = w[..., None, :] - self.optima
        return 0.5 * np.einsum("...id,ide,...ie->...i", away, self.hessians, away)

    def posterior(self, sample_weights):
        """(mean, covariance) under the weights."""
        shares = sample_weights / sample_weights.sum()
        hessian = np.einsum("i,ide->de", shares, self.hessians)
        precision = self.inverse_temperature * hessian + self.localization * np.eye(DIMENSION)
        pull = self.inverse_temperature * np.einsum("i,ide,ie->d", shares, self.hessians, self.optima)
        return np.linalg.solve(precision, pull + self.localization * self.center), np.linalg.inv(precision)

    def truth(self, sample_weights):
        """(lambda, F), F up to a constant."""
        shares = sample_weights / sample_weights.sum()
        mean, covariance = self.posterior(sample_weights)
        at_mean = shares @ self.losses(mean)
        spread = 0.5 * np.einsum("i,ide,ed->", shares, self.hessians, covariance)
        coefficient = self.inverse_temperature * (at_mean + spread - shares @ self.at_center)
        energy = self.inverse_temperature * at_mean - 0.5 * np.linalg.slogdet(covariance)[1]
        energy += 0.5 * self.localization * np.sum((mean - self.center) ** 2)
        return np.array([coefficient, energy])

    def differences(self, base, step=1e-4):
        """d(lambda, F) / dh_i at rho = base + h, by central differences. [2, sample]"""
        columns = []
        for direction in np.eye(SAMPLES):
            up, down = (self.truth(base + s * step * direction) for s in (1, -1))
            columns.append((up - down) / (2 * step))
        return np.array(columns).T

    def chains(self, rng, num_chains, num_draws, base, autocorrelation=0.0):
        """Co-moments of exact draws: observables [some other, L - L(w*)], columns the deviations of the samples."""
        mean, covariance = self.posterior(base)
        noise = rng.normal(size=(num_chains, num_draws, DIMENSION))
        noise[:, 1:] *= np.sqrt(1 - autocorrelation**2)
        noise = lfilter([1.0], [1.0, -autocorrelation], noise, axis=1)
        chains = []
        for number, w in enumerate(mean + noise @ np.linalg.cholesky(covariance).T):
            deviations = self.losses(w) - self.at_center
            phi = np.stack([w[:, 0], deviations @ base / base.sum()], axis=1)
            moments = CoMoments.empty(number, num_draws, 2, SAMPLES, 8)
            moments.update(phi, deviations.astype(np.float32))  # as chains push them
            chains.append(moments)
        return chains


def uniform():
    return np.ones(SAMPLES)


@pytest.mark.parametrize("at_minimum", [True, False])
@pytest.mark.parametrize(("inverse_temperature", "localization"), [(23.0, 5.0), (3.0, 40.0), (500.0, 90.0)])
def test_responses_equal_finite_differences(inverse_temperature, localization, at_minimum):
    problem = Problem(1, inverse_temperature, localization, at_minimum)
    chains = problem.chains(np.random.default_rng(2), 16, 20_000, uniform())
    scale = inverse_temperature / SAMPLES
    for measured, wanted in zip(
        (llc_response(chains, 1, inverse_temperature), free_energy_response(chains, problem.at_center)),
        problem.differences(uniform()),
        strict=True,
    ):
        z = (scale * measured.chi[0] - wanted) / (scale * measured.standard_error[0])
        assert np.abs(z).max() < 4.5
        # The errors are small against what is measured, and the rows sum to zero over the samples of L.
        assert np.median(scale * measured.standard_error) < 0.05 * np.abs(wanted).max()
        assert abs(measured.chi.sum()) < 1e-12


def test_lambda_of_a_regular_model_does_not_answer_to_any_sample():
    """gamma = 0: lambda is d / 2 whatever the Hessian. The covariance alone would say otherwise."""
    inverse_temperature = 37.0
    problem = Problem(3, inverse_temperature, 0.0)
    chains = problem.chains(np.random.default_rng(4), 16, 20_000, uniform())
    assert problem.truth(uniform())[0] == pytest.approx(DIMENSION / 2)
    np.testing.assert_allclose(problem.differences(uniform())[0], 0, atol=1e-6)
    whole = llc_response(chains, 1, inverse_temperature)
    assert np.abs(whole.chi / whole.standard_error).max() < 4.5
    covariance = susceptibility(chains)  # of the component loss: -Cov(L, l_i - L)
    assert np.abs(covariance.chi[1] / covariance.standard_error[1]).max() > 20
    direct = free_energy_response(chains, np.zeros(SAMPLES))  # the mean deviations alone
    assert np.abs(direct.chi / direct.standard_error).max() > 20
    # What is left is small against either term.
    assert np.abs(whole.chi).max() < 0.05 * np.abs(inverse_temperature * covariance.chi[1]).max()


def test_autocorrelation_does_not_upset_the_balance_of_the_terms():
    """A covariance about a chain's own mean is low by tau / T, 9 % here: so much would be left of terms that cancel."""
    inverse_temperature, num_chains, num_draws = 37.0, 600, 100
    problem = Problem(3, inverse_temperature, 0.0)
    chains = problem.chains(np.random.default_rng(15), num_chains, num_draws, uniform(), autocorrelation=0.9)
    whole = llc_response(chains, 1, inverse_temperature)
    direct = free_energy_response(chains, np.zeros(SAMPLES)).chi[0]
    left = (whole.chi[0] @ direct) / (direct @ direct)
    naive = [m.total().comoment[1] / (m.count.sum() - 1) for m in chains]
    naive = direct - inverse_temperature * (np.mean(naive, axis=0) - np.mean(naive))
    assert (naive @ direct) / (direct @ direct) > 0.05
    assert abs(left) < 0.035


def test_localisation_leaves_the_sign_of_the_direct_term():
    """One sharp and one flat sample around one optimum: d lambda_i = n_beta gamma (H_i - H) / (2 n P^2) summed over
    directions, P = n_beta H + gamma, of the sign of the direct term and opposed to the covariance."""
    inverse_temperature, localization = 60.0, 25.0
    problem = Problem(5, inverse_temperature, localization)
    problem.hessians = np.array([1.5, 0.5, 1.0, 1.0, 1.2, 0.8])[:, None, None] * np.eye(DIMENSION)
    problem.optima[:] = problem.center
    problem.at_center = np.zeros(SAMPLES)
    precision = inverse_temperature * 1.0 + localization
    contrast = problem.hessians[:, 0, 0] - 1.0
    wanted = DIMENSION * inverse_temperature * localization * contrast / (2 * SAMPLES * precision**2)
    np.testing.assert_allclose(problem.differences(uniform())[0], wanted, atol=1e-6)
    chains = problem.chains(np.random.default_rng(6), 16, 20_000, uniform())
    whole = llc_response(chains, 1, inverse_temperature)
    scale = inverse_temperature / SAMPLES
    constant = contrast == 0  # then l_i is L itself, up to float32
    z = (scale * whole.chi[0] - wanted)[~constant] / (scale * whole.standard_error[0])[~constant]
    assert np.abs(z).max() < 4.5
    np.testing.assert_allclose(whole.chi[0][constant], 0, atol=1e-9)
    covariance = susceptibility(chains).chi[1]
    assert (np.sign(covariance[~constant]) == -np.sign(wanted[~constant])).all()


def test_weights_of_l_that_are_not_uniform():
    """L over some columns alone: an added sample answers by (n_beta / n) chi too, n the samples of L."""
    inverse_temperature, localization = 23.0, 5.0
    problem = Problem(7, inverse_temperature, localization)
    base = np.array([1.0, 1, 1, 1, 1, 0])
    chains = problem.chains(np.random.default_rng(8), 16, 20_000, base)
    wanted = problem.differences(base)
    for measured, row in zip(
        (
            llc_response(chains, 1, inverse_temperature, loss_weights=base),
            free_energy_response(chains, problem.at_center, loss_weights=3 * base),
        ),
        wanted,
        strict=True,
    ):
        scale = inverse_temperature / base.sum()
        z = (scale * measured.chi[0] - row) / (scale * measured.standard_error[0])
        assert np.abs(z).max() < 4.5
        assert abs(measured.chi[0] @ base) < 1e-12


def test_responses_are_the_parts_they_are_made_of():
    problem = Problem(9, 11.0, 2.0, at_minimum=False)
    chains = problem.chains(np.random.default_rng(10), 3, 64, uniform(), autocorrelation=0.5)
    deviations = np.array([moments.total().mean_loss for moments in chains])
    direct = deviations - deviations.mean(axis=1, keepdims=True)
    covariance = susceptibility(chains)
    whole = llc_response(chains, 1, 11.0)
    np.testing.assert_allclose(whole.chi_per_chain[:, 0], direct + 11.0 * covariance.chi_per_chain[:, 1], atol=1e-12)
    np.testing.assert_allclose(whole.chi[0], whole.chi_per_chain[:, 0].mean(axis=0))
    energy = free_energy_response(chains, problem.at_center)
    at_center = problem.at_center - problem.at_center.mean()
    np.testing.assert_allclose(energy.chi_per_chain[:, 0], direct + at_center, atol=1e-12)
    assert whole.chi.shape == energy.chi.shape == (1, SAMPLES)
    assert whole.chains == (0, 1, 2)
    # lambda itself, from the same chains: n_beta times the mean of the component loss.
    assert llc(np.tile(deviations.mean(axis=1)[:, None], 4), 11.0).value == pytest.approx(
        11.0 * np.mean([moments.total().mean_phi[1] for moments in chains]), rel=1e-6
    )


def test_what_cannot_be_used_is_named():
    problem = Problem(11, 11.0, 2.0)
    chains = problem.chains(np.random.default_rng(12), 2, 64, uniform())
    with pytest.raises(PatterningError, match=r"chain 0: the observable is not the mean probe loss .* component_loss"):
        llc_response(chains, 0, 11.0)
    with pytest.raises(PatterningError, match="the observable is not the mean probe loss"):
        llc_response(chains, 1, 11.0, loss_weights=[1, 1, 1, 1, 1, 0])
    with pytest.raises(PatterningError, match="observable 2: chain 0 has observables 0 to 1; give the row of"):
        llc_response(chains, 2, 11.0)
    with pytest.raises(PatterningError, match=r"center_losses: expected 6 finite losses .* got shape \(5,\)"):
        free_energy_response(chains, problem.at_center[1:])
    with pytest.raises(PatterningError, match="center_losses: expected 6 finite losses"):
        free_energy_response(chains, np.full(SAMPLES, np.nan))
    for estimate in (
        lambda: llc_response(chains, 1, 11.0, min_chains=3, excluded={7: "NaN at 3"}),
        lambda: free_energy_response(chains, problem.at_center, min_chains=3, excluded={7: "NaN at 3"}),
    ):
        with pytest.raises(
            PatterningError, match=r"2 healthy chains, expected at least 3 .*chain 7 excluded: NaN at 3"
        ):
            estimate()


@pytest.mark.parametrize("num_chains", [2, 4, 8])
@pytest.mark.parametrize(("autocorrelation", "num_draws"), [(0.0, 64), (0.8, 240)])
def test_intervals_cover(num_chains, autocorrelation, num_draws):
    """chi, the response of lambda and that of F, each from few chains of correlated draws."""
    inverse_temperature = 23.0
    problem, rng = Problem(13, inverse_temperature, 5.0, at_minimum=False), np.random.default_rng([14, num_chains])
    coefficient, energy = problem.differences(uniform()) * SAMPLES / inverse_temperature
    mean, covariance = problem.posterior(uniform())
    gradients = np.einsum("ide,ie->id", problem.hessians, mean - problem.optima)
    spread = problem.hessians @ covariance
    products = 0.5 * np.einsum("iab,jba->ij", spread, spread) + gradients @ covariance @ gradients.T
    chi = -(products - products.mean(axis=1, keepdims=True)).mean(axis=0)  # of L
    covered = []
    for _ in range(200):
        chains = problem.chains(rng, num_chains, num_draws, uniform(), autocorrelation)
        estimates = (
            (susceptibility(chains), 1, chi),
            (llc_response(chains, 1, inverse_temperature), 0, coefficient),
            (free_energy_response(chains, problem.at_center), 0, energy),
        )
        inside = []
        for measured, row, truth in estimates:
            low, high = measured.interval()
            inside.append((low[row] < truth) & (truth < high[row]))
        covered.append(inside)
    shares = np.mean(covered, axis=(0, 2))
    # Samples share the draws of a run, so that runs are what varies. A thousand fresh ones of the case that comes
    # nearest to the upper end (F, two chains of 240 correlated draws) cover 98.7 +- 0.2 %.
    error = np.std(np.mean(covered, axis=2), axis=0) / len(covered) ** 0.5
    assert (shares >= 0.90).all(), shares
    assert (shares <= 0.99 + 2 * error).all(), (shares, error)
