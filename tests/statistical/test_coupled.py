"""Coupled chains against closed forms: quadratic losses, whose posterior is Gaussian at every strength.

rho = 1 + s h makes of l_i = 1/2 (w - a_i)^T H_i (w - a_i) the same with rho_i H_i. Chains of full gradients are linear
recursions, so that their expectations are known at the step size that they have.
"""

from __future__ import annotations

import numpy as np
import pytest
from gaussian_problem import Problem, Walk

from patterning_dist.response.coupled import (
    Linear,
    coupled_mean,
    free_energy_slope,
    integrated,
    smallest_pair,
    symmetric_slope,
    verdict,
)
from patterning_dist.response.llc import TraceMean, llc_response
from patterning_dist.response.moments import CoMoments
from patterning_dist.sampling import sgld

H = np.array([0.6, -0.8, 0.5, -0.7, 0.4])  # of mean 0


class Weighted(Problem):
    """The problem on L_rho."""

    def __init__(self, strength, inverse_temperature=23.0, localization=7.0, stiffness=0.4, pull=0.3, h=H):
        super().__init__(3, inverse_temperature, localization, stiffness, pull=pull, seed=4)
        plain = self.hessians
        self.h, self.strength = h, strength
        self.hessians = (1 + strength * h)[:, None, None] * plain
        self.hessian = self.hessians.mean(axis=0)
        linear = np.einsum("ide,ie->d", self.hessians, self.optima) / len(self.optima)
        self.optimum = np.linalg.solve(self.hessian, linear)
        self.precision = inverse_temperature * self.hessian + localization * np.eye(3)
        self.covariance = np.linalg.inv(self.precision)
        self.mean = self.covariance @ (inverse_temperature * linear + localization * self.center)

    def plain_losses(self, w):
        """l_i(w) - l_i(w*) without weights [..., sample]."""
        return self.losses(w) / (1 + self.strength * self.h)

    def expected(self, covariance):
        """Means of l_i(w) - l_i(w*) under N(mean, covariance) [sample]."""
        spread = 0.5 * np.einsum("ide,ed->i", self.hessians, covariance)
        return self.plain_losses(self.mean) + spread / (1 + self.strength * self.h)

    def at_center(self):
        """D(w*)."""
        away = self.center - self.optima
        return np.mean(
            self.h * 0.5 * np.einsum("id,ide,ie->i", away, self.hessians, away) / (1 + self.strength * self.h)
        )

    def free_energy(self):
        """-log integral exp(-n_beta L_rho - gamma/2 |w - w*|^2), less d/2 log 2 pi."""
        n_beta, away = self.posterior.inverse_temperature, self.mean - self.optima
        at_mean = n_beta * 0.5 * np.einsum("id,ide,ie->", away, self.hessians, away) / len(away)
        pull = 0.5 * self.posterior.localization * np.sum((self.mean - self.center) ** 2)
        return at_mean + pull + 0.5 * np.linalg.slogdet(self.precision)[1]


def walked(strength, step_size, num_chains, num_draws, seed, **settings):
    """Traces of coupled chains at one strength: l_i - l_i(w*) [chain, draw, sample]."""
    problem = Weighted(strength, **settings)
    walk = Walk(problem, sgld, num_chains, seed, step_size=step_size)
    walk.advance(problem.mixing_steps(1e-4, step_size))
    return walk.record(num_draws, 2) / (1 + strength * problem.h)


STRENGTHS = (-0.8, 0.0, 0.8)


@pytest.fixture(scope="module")
def traces():
    step_size = Weighted(0.8).step_size
    return step_size, {s: walked(s, step_size, 64, 400, seed=1) for s in STRENGTHS}


@pytest.mark.parametrize("strength", [-0.8, 0.8])
def test_losses_and_llc_respond_as_in_closed_form_at_a_finite_strength(traces, strength):
    step_size, losses = traces
    problems = {s: Weighted(s) for s in STRENGTHS}
    exact = {s: p.expected(p.recursion_covariance(step_size)) for s, p in problems.items()}
    for sample in range(len(H)):
        found = coupled_mean(losses[strength][..., sample] - losses[0.0][..., sample])
        assert abs(found.value - (exact[strength] - exact[0.0])[sample]) < 4.5 * found.standard_error
    rho, n_beta = 1 + strength * H, problems[0.0].posterior.inverse_temperature
    found = coupled_mean(n_beta * ((rho * losses[strength]).mean(axis=-1) - losses[0.0].mean(axis=-1)))
    wanted = n_beta * ((rho * exact[strength]).mean() - exact[0.0].mean())
    assert abs(found.value - wanted) < 4.5 * found.standard_error
    alone = coupled_mean(n_beta * losses[0.0].mean(axis=-1))
    assert found.standard_error < 0.5 * alone.standard_error


def slope_trace(losses, strength):
    """dF/ds of the chains at one strength, from L_rho and L as chains record them."""
    problem = Weighted(strength)
    weighted, plain = ((rho * losses).mean(axis=-1) for rho in (1 + strength * H, np.ones(len(H))))
    return free_energy_slope(
        weighted, plain, strength, problem.posterior.inverse_temperature, problem.at_center(), mean_weight=1.0
    )


def test_the_free_energy_is_the_integral_of_slopes_away_from_zero(traces):
    """Chains at -s and s alone, against the exact slopes that chains of this step size have."""
    step_size, losses = traces

    def exact(s):
        problem = Weighted(s)
        expected = problem.expected(problem.recursion_covariance(step_size))
        return problem.posterior.inverse_temperature * (np.mean(H * expected) + problem.at_center())

    slopes = {s: slope_trace(losses[s], s) for s in (-0.8, 0.8)}
    for s, trace in slopes.items():
        found = coupled_mean(trace)
        assert abs(found.value - exact(s)) < 4.5 * found.standard_error < 0.2 * abs(exact(s))
    change = coupled_mean(integrated(slopes, 0.8))
    wanted = 0.8 * (0.75 * exact(0.8) + 0.25 * exact(-0.8))  # of the straight line through both
    assert abs(change.value - wanted) < 4.5 * change.standard_error


def test_the_integral_is_of_the_order_of_the_number_of_strengths():
    """Exact slopes of the posterior itself, against the closed form of F: halving s takes 2^(k+1) off the error."""

    def slope(s):
        problem = Weighted(s)
        return problem.posterior.inverse_temperature * (
            np.mean(H * problem.expected(problem.covariance)) + problem.at_center()
        )

    def error(*strengths):
        slopes = {s: np.full((1, 1), slope(s)) for s in strengths}
        at = strengths[-1]
        return integrated(slopes, at).item() - (Weighted(at).free_energy() - Weighted(0.0).free_energy())

    for shape in ((1.0,), (-1.0, 1.0), (-1.0, 0.5, 1.0)):
        coarse, fine = (abs(error(*(0.1 * scale * s for s in shape))) for scale in (2, 1))
        assert coarse / fine == pytest.approx(2.0 ** (len(shape) + 1), rel=0.2)
        assert fine > 1e-10  # or there is nothing to compare


def test_the_symmetric_difference_cancels_the_second_order():
    def mean(s):
        problem = Weighted(s)
        return problem.expected(problem.covariance)

    exact = symmetric_slope(mean(1e-4), mean(-1e-4), 1e-4)
    both, one = ([symmetric_slope(mean(s), mean(-s), s) - exact, (mean(s) - mean(0.0)) / s - exact] for s in (0.2, 0.1))
    np.testing.assert_allclose(both[0] / one[0], 4.0, rtol=0.2)  # third order: s^2 in the slope
    np.testing.assert_allclose(both[1] / one[1], 2.0, rtol=0.2)  # second order: s


def test_chi_is_the_slope_at_zero(traces):
    """The covariance form of the LLC's response and coupled chains of +-s, each with its error, at a small step."""
    step_size, pair, settings = 0.02 * Weighted(0.3).step_size / 0.4, 0.1, {"localization": 40.0}
    losses = {s: walked(s, step_size, 64, 300, seed=2, **settings) for s in (-pair, 0.0, pair)}
    n_beta = 23.0
    above, below = (n_beta * ((1 + s * H) * losses[s]).mean(axis=-1) for s in (pair, -pair))
    slope = coupled_mean(symmetric_slope(above, below, pair))
    chains = [coarse(number, chain) for number, chain in enumerate(losses[0.0])]
    per_chain = n_beta / len(H) * llc_response(chains, 0, n_beta).chi_per_chain[:, 0] @ H
    error = per_chain.std(ddof=1) / np.sqrt(len(per_chain))
    linear = Linear(per_chain.mean(), error, 2 * error, per_chain)
    found = verdict(slope, linear, symmetric_slope(above, below, pair).mean(axis=1))
    assert found["verdict"] == "agrees" and abs(found["z"]) < 3 and found["ratio"] == pytest.approx(1, abs=0.3)
    assert slope.standard_error < 0.8 * error


def coarse(number, losses):
    """Co-moments of one chain whose observable is its mean loss."""
    moments = CoMoments.empty(number, len(losses), 1, losses.shape[-1], 8)
    moments.update(losses.mean(axis=-1, keepdims=True), losses)
    return moments


@pytest.mark.parametrize("num_chains", [4, 8])
def test_intervals_of_coupled_differences_cover(num_chains):
    """Three losses of 200 measurements, of chains of 30 correlated draws each."""
    strength, groups = 0.5, 200
    step_size = Weighted(strength).step_size
    losses = {s: walked(s, step_size, num_chains * groups, 30, seed=3) for s in (0.0, strength)}
    exact = {s: Weighted(s).expected(Weighted(s).recursion_covariance(step_size)) for s in losses}
    covered = []
    for sample in range(3):
        difference = (losses[strength] - losses[0.0])[..., sample].reshape(groups, num_chains, 30)
        bounds = np.array([coupled_mean(group).interval() for group in difference])
        wanted = (exact[strength] - exact[0.0])[sample]
        covered += [(bounds[:, 0] <= wanted) & (wanted <= bounds[:, 1])]
    assert 0.90 <= np.mean(covered) <= 0.99


def test_few_chains_take_the_larger_error():
    trace = np.random.default_rng(0).normal(size=(3, 40))
    assert coupled_mean(trace).standard_error >= trace.mean(axis=1).std(ddof=1) / np.sqrt(3)
    assert coupled_mean(trace[:1]).standard_error == pytest.approx(1 / np.sqrt(40), rel=0.5)


def test_coupled_chains_keep_the_sign_of_the_llc_response_where_the_covariance_turns_it():
    """A step that biases the LLC by 16 %: the covariance form is a difference of (1 + b) and (1 + b)^2 terms."""
    settings = {
        "localization": 0.4,
        "inverse_temperature": 30.0,
        "pull": 0.0,
        "h": np.array([1.0, 1.0, -1.0, -1.0, 0.0]),
    }
    problems = {s: Weighted(s, **settings) for s in (-0.3, 0.0, 0.3)}
    largest = np.linalg.eigvalsh(problems[0.0].precision).max()
    step_size = 0.95 / largest

    def llc(problem, covariance):
        return 30.0 * ((1 + problem.strength * problem.h) * problem.expected(covariance)).mean()

    bias = llc(problems[0.0], problems[0.0].recursion_covariance(step_size)) / llc(
        problems[0.0], problems[0.0].covariance
    )
    assert bias == pytest.approx(1.16, abs=0.06)
    exact = (llc(problems[0.3], problems[0.3].covariance) - llc(problems[-0.3], problems[-0.3].covariance)) / 0.6
    losses = {s: walked(s, step_size, 64, 1000, seed=5, **settings) for s in problems}
    chains = [coarse(number, chain) for number, chain in enumerate(losses[0.0])]
    per_chain = 30.0 / 5 * llc_response(chains, 0, 30.0).chi_per_chain[:, 0] @ settings["h"]
    covariance, error = per_chain.mean(), per_chain.std(ddof=1) / 8
    above, below = (30.0 * ((1 + s * settings["h"]) * losses[s]).mean(axis=-1) for s in (0.3, -0.3))
    coupled = coupled_mean(symmetric_slope(above, below, 0.3))
    assert coupled.value / exact > 0 and abs(coupled.value) > 4 * coupled.standard_error
    assert covariance / exact < 0 and abs(covariance) > 4 * error


def test_verdicts():
    def found(value, error, predicted, its_error, exact=0.0):
        return verdict(
            TraceMean(value, error, 50.0), Linear(predicted, its_error, 2 * its_error), np.full(5, value), exact
        )

    assert found(-0.20, 0.01, -0.21, 0.004)["verdict"] == "agrees"
    apart = found(-0.20, 0.01, -0.30, 0.03)
    assert apart["verdict"] == "disagrees" and apart["z"] == pytest.approx(0.1 / np.hypot(0.01, 0.03))
    assert apart["ratio"] == pytest.approx(2 / 3)
    assert found(0.01, 0.01, -0.02, 0.02)["verdict"] == "not resolved"
    # 0.5 of both is known exactly: what is left is noise, and no ratio near 1 comes of it.
    known = found(0.51, 0.01, 0.48, 0.02, exact=0.5)
    assert known["verdict"] == "not resolved" and known["ratio"] == pytest.approx(-0.5)
    assert found(-0.20, 0.01, -0.21, np.nan)["z"] == pytest.approx(1.0)
    # Chains that share their noise: what differs from chain to chain is alike in both numbers, and a shift is seen.
    shared = np.random.default_rng(0).normal(size=8)
    apart = 0.1 + 0.01 * np.random.default_rng(1).normal(size=8)
    both = coupled_mean((shared + apart)[:, None].repeat(4, axis=1))
    alike = verdict(both, Linear(shared.mean(), both.standard_error, 1.0, shared), shared + apart)
    assert alike["z"] > 10
    alike = verdict(both, Linear(shared.mean(), both.standard_error, 1.0), shared + apart)
    assert alike["z"] < 1
    assert smallest_pair([1.0, -0.25, 0.25, -1.0]) == 0.25 and smallest_pair([0.5, -0.25]) is None
