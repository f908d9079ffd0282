"""The response of the LLC needs its direct term: the covariance alone points the wrong way.

Two solutions of the same task, each a minimum of one weight w. At U the samples of class A see a parabola and those of
class B a quartic; at V it is the other way round. Weighting A up makes U more regular (lambda towards 1/2) and V more
degenerate (towards 1/4). Truth is quadrature at weights a finite step away from 1; the estimate comes from SGLD draws.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from patterning_dist.response.llc import free_energy_response, llc_response
from patterning_dist.response.moments import CoMoments
from patterning_dist.response.solver import solve_weights
from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.sampling import sgld
from patterning_dist.sampling.posterior import Posterior

INVERSE_TEMPERATURE, LOCALIZATION, STEP_SIZE = 300.0, 5.0, 1e-4
CLASS_SIZE = 6
IN_A = np.repeat([1.0, 0.0], CLASS_SIZE)
TOWARD_A = 2 * IN_A - 1  # h, of mean 0
GRID = np.linspace(-3, 3, 60_001)


class Solution(NamedTuple):
    """l_i(w) = a_i w^2 / 2 + b_i w^4; w* = 0 and l_i(w*) = 0 at every solution."""

    parabola: np.ndarray  # sample
    quartic: np.ndarray  # sample

    def losses(self, w):
        square = w[..., None] ** 2
        return 0.5 * self.parabola * square + self.quartic * square**2

    def truth(self, sample_weights):
        """(lambda, F) by quadrature, F up to the same constant for all weights."""
        loss = self.losses(GRID) @ sample_weights / sample_weights.sum()
        density = np.exp(-INVERSE_TEMPERATURE * loss - LOCALIZATION / 2 * GRID**2)
        return INVERSE_TEMPERATURE * (density @ loss) / density.sum(), -np.log(density.sum())

    def chains(self, seed, num_chains=96, num_draws=160, steps_between_draws=50):
        generator = torch.Generator().manual_seed(seed)
        parabola, quartic = self.parabola.mean(), self.quartic.mean()
        center = {"w": torch.zeros(num_chains, dtype=torch.float64)}
        state, draws = sgld.init({"w": center["w"].clone()}), []
        for step in range((num_draws + 10) * steps_between_draws):
            w = state.position["w"]
            if step % steps_between_draws == 0:
                draws.append(w.numpy().copy())
            state = sgld.step_(
                state,
                {"w": parabola * w + 4 * quartic * w**3},
                {"w": torch.randn(num_chains, generator=generator, dtype=torch.float64)},
                center=center,
                posterior=Posterior(INVERSE_TEMPERATURE, LOCALIZATION),
                step_size=STEP_SIZE,
            )
        chains = []
        for number, w in enumerate(np.stack(draws[10:], axis=1)):  # burn-in left out
            losses = self.losses(w)
            moments = CoMoments.empty(number, num_draws, 1, losses.shape[1], 8)
            moments.update(losses.mean(axis=1, keepdims=True), losses)
            chains.append(moments)
        return chains


def coefficients(seed, in_a, in_b):
    """Scattered around `in_a` for samples of class A and around `in_b` for those of class B."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0.6, 1.4, size=2 * CLASS_SIZE) * np.where(IN_A == 1, in_a, in_b)


U = Solution(coefficients(0, 1.0, 0.0), coefficients(1, 0.0, 5.0))
V = Solution(coefficients(2, 0.0, 1.3), coefficients(3, 6.0, 0.0))


class Response(NamedTuple):
    """d/dt at weights 1 + t h, and its standard error."""

    value: float
    error: float


def along(measured, direction):
    """(n_beta / n) chi . h with its error from the spread between chains."""
    per_chain = INVERSE_TEMPERATURE / len(direction) * measured.chi_per_chain[:, 0] @ direction
    return Response(per_chain.mean(), per_chain.std(ddof=1) / np.sqrt(len(per_chain)))


@pytest.fixture(scope="module")
def chains():
    return {"U": U.chains(10), "V": V.chains(11)}


def measured_change(solution, direction, strength):
    up, down = (np.array(solution.truth(1 + s * strength * direction)) for s in (1, -1))
    return (up - down) / (2 * strength)


@pytest.mark.parametrize(("name", "solution", "sign"), [("U", U, 1), ("V", V, -1)])
def test_the_covariance_alone_has_the_wrong_sign(chains, name, solution, sign):
    change, _ = measured_change(solution, TOWARD_A, 0.2)
    derivative, _ = measured_change(solution, TOWARD_A, 1e-3)
    whole = along(llc_response(chains[name], 0, INVERSE_TEMPERATURE), TOWARD_A)
    # chi of the component loss is -Cov(L, l_i - L); times n_beta it is all that the covariance says of lambda.
    covariance = along(susceptibility(chains[name]), INVERSE_TEMPERATURE * TOWARD_A)
    assert sign * change > 0.05
    assert sign * covariance.value < -0.1 - 4.5 * covariance.error
    assert sign * whole.value > 0.05 + 4.5 * whole.error
    # The bias of the step is a percent or two of each term, which largely cancel.
    assert abs(whole.value - derivative) < 4.5 * whole.error + 0.03 * abs(covariance.value)
    assert abs(whole.value - change) < 0.1 * abs(change) + 4.5 * whole.error + 0.03 * abs(covariance.value)


def test_the_difference_between_solutions(chains):
    truth = measured_change(U, TOWARD_A, 0.2) - measured_change(V, TOWARD_A, 0.2)
    whole = [along(llc_response(chains[name], 0, INVERSE_TEMPERATURE), TOWARD_A) for name in "UV"]
    covariance = [along(susceptibility(chains[name]), INVERSE_TEMPERATURE * TOWARD_A) for name in "UV"]
    free_energy = [along(free_energy_response(chains[name], np.zeros(2 * CLASS_SIZE)), TOWARD_A) for name in "UV"]
    assert truth[0] > 0.1
    assert whole[0].value - whole[1].value == pytest.approx(truth[0], rel=0.15)
    assert covariance[0].value - covariance[1].value < -0.2
    # The free energy moves against the odds: U loses ground to V. First moments only, so it is the more certain.
    assert free_energy[0].value - free_energy[1].value == pytest.approx(truth[1], rel=0.05)
    for energy, coefficient in zip(free_energy, whole, strict=True):
        assert energy.error / abs(energy.value) < coefficient.error / abs(coefficient.value)


def test_the_direct_term_alone_is_no_answer_either():
    """Where the quartic rules, it is the direct term that has the wrong sign."""
    flat = Solution(coefficients(0, 0.1, 0.0), coefficients(1, 0.0, 5.0))
    chains = flat.chains(12)
    derivative, _ = measured_change(flat, TOWARD_A, 1e-3)
    direct = along(free_energy_response(chains, np.zeros(2 * CLASS_SIZE)), TOWARD_A)
    whole = along(llc_response(chains, 0, INVERSE_TEMPERATURE), TOWARD_A)
    assert derivative > 0.03
    assert direct.value < -0.05 - 4.5 * direct.error
    assert abs(whole.value - derivative) < 4.5 * whole.error + 0.03 * abs(direct.value)


def test_the_solver_takes_the_rows_and_the_weights_do_what_they_promise(chains):
    """Ask for a higher lambda at U and a lower one at V: both move so, by what was predicted."""
    rows = [llc_response(chains[name], 0, INVERSE_TEMPERATURE).chi for name in "UV"]
    target = np.array([0.01, -0.01])
    solution = solve_weights(np.concatenate(rows), target, inverse_temperature=INVERSE_TEMPERATURE)
    moved = [s.truth(solution.weights)[0] - s.truth(np.ones(2 * CLASS_SIZE))[0] for s in (U, V)]
    np.testing.assert_allclose(moved, target, rtol=0.25)
    # The covariance rows alone would have been told to do the opposite.
    wrong = np.concatenate([INVERSE_TEMPERATURE * susceptibility(chains[name]).chi for name in "UV"])
    misled = solve_weights(wrong, target, inverse_temperature=INVERSE_TEMPERATURE)
    moved = [s.truth(misled.weights)[0] - s.truth(np.ones(2 * CLASS_SIZE))[0] for s in (U, V)]
    assert moved[0] - moved[1] < 0
