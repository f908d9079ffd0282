"""Answers at eps and eps / 2 on a Gaussian posterior, and what they make at 0, against closed forms.

Sample i has the loss sum_k a_ik w_k + h_k w_k^2 / 2, sum_i a_ik = 0, so that full gradients leave independent Gaussians
of precision P_k = n_beta h_k + gamma and, at a step, of variance v_k(eps) = 1 / (P_k (1 - eps P_k / 4)) about 0:

    LLC(eps) = n_beta / 2 sum_k h_k v_k ,   chi_i(eps) of the observable sum_k c_k w_k = - sum_k c_k a_ik v_k .

2 v(eps/2) - v(eps) = v(0) (1 - (eps P)^2 / 32 + ...): of a bias of 14 % at eps P = .5, 1 % is left.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from patterning_dist import CoMoments, Posterior, sample_chains, step_extrapolated
from patterning_dist.response.llc import llc
from patterning_dist.response.susceptibility import susceptibility

torch.set_num_threads(1)

INVERSE_TEMPERATURE, LOCALIZATION = 7.0, 3.0
CURVATURES = np.repeat([1.0, 3.0], 40)
PRECISIONS = INVERSE_TEMPERATURE * CURVATURES + LOCALIZATION
SLOPES = np.random.default_rng(1).normal(size=(10, 80)) * (CURVATURES > 1)
SLOPES -= SLOPES.mean(axis=0)
OBSERVED = SLOPES[0]  # c: the observable goes with the loss of sample 0
STIFFNESS = 0.5  # eps times the largest precision
SPACING, BURN_IN = 5, 40  # steps


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(CURVATURES)))


def losses(model, batch):
    return batch[0] @ model.w + 0.5 * (torch.tensor(CURVATURES, dtype=torch.float32) * model.w.square()).sum()


def sampled(halvings, seed, num_draws):
    """Four chains whose draws are as far apart in time at every step size."""
    data, observed = TensorDataset(torch.tensor(SLOPES).float()), torch.tensor(OBSERVED).float()
    return sample_chains(
        Point(),
        losses,
        data,
        data,
        posterior=Posterior(INVERSE_TEMPERATURE, LOCALIZATION),
        observables={"w": lambda model: observed @ model.w},
        step_size=STIFFNESS / PRECISIONS.max() / 2**halvings,
        burn_in=BURN_IN * 2**halvings,
        steps_between_draws=SPACING * 2**halvings,
        gradient="full",
        num_draws=num_draws,
        seed=seed,
    )


def exact(stiffness):
    """(LLC, chi [sample]) of chains at that step; 0: of the posterior."""
    found = 1 / (PRECISIONS * (1 - stiffness * PRECISIONS / PRECISIONS.max() / 4))
    return INVERSE_TEMPERATURE / 2 * (CURVATURES * found).sum(), -SLOPES @ (OBSERVED * found)


TRUE, COARSE, FINE = (exact(stiffness) for stiffness in (0.0, STIFFNESS, STIFFNESS / 2))
AT_0 = tuple(2 * fine - coarse for fine, coarse in zip(FINE, COARSE, strict=True))  # the truth, up to second order


@pytest.fixture(scope="module")
def found():
    coarse, fine = sampled(0, seed=3, num_draws=600), sampled(1, seed=4, num_draws=600)
    lambdas = (llc(s.losses, INVERSE_TEMPERATURE) for s in (coarse, fine))
    return step_extrapolated(*lambdas), step_extrapolated(*(susceptibility(s.chains) for s in (coarse, fine)))


def test_the_llc_at_step_size_0_is_that_of_the_posterior_and_that_of_the_step_is_not(found):
    measured = found[0]
    for answer, expected in (
        (measured.extrapolated, AT_0[0]),
        (measured.coarse, COARSE[0]),
        (measured.bias, COARSE[0] - FINE[0]),
    ):
        assert abs(answer.value - expected) < 4 * answer.standard_error
    assert abs(AT_0[0] - TRUE[0]) < measured.extrapolated.standard_error  # what is left is within the error
    assert abs(measured.extrapolated.value - TRUE[0]) < 4 * measured.extrapolated.standard_error
    assert measured.coarse.value - TRUE[0] > 6 * measured.coarse.standard_error
    assert measured.is_biased and measured.bias_ratio > 6


def test_chi_at_step_size_0_is_that_of_the_posterior_and_that_of_the_step_is_not(found):
    measured = found[1]
    for answer, expected in (
        (measured.extrapolated, AT_0[1]),
        (measured.coarse, COARSE[1]),
        (measured.bias, COARSE[1] - FINE[1]),
    ):
        # Row 0 is the component loss. Ten values, of which one in 16,000 lies beyond 4 standard errors.
        assert (np.abs(answer.chi[1] - expected) < 4 * answer.standard_error[1]).all()
    low, high = (end[1, 0] for end in measured.extrapolated.interval())
    assert low < TRUE[1][0] < high
    low, high = (end[1, 0] for end in measured.coarse.interval())
    assert not low < TRUE[1][0] < high


def recursion(generator, halvings, num_sets, num_draws):
    """Draws of what a step is on these coordinates, after burn-in [draw, set, chain, coordinate]."""
    step_size, every = STIFFNESS / PRECISIONS.max() / 2**halvings, SPACING * 2**halvings
    w, draws = np.zeros((num_sets, 4, len(PRECISIONS))), []
    for step in range(-BURN_IN * 2**halvings, num_draws * every):
        w = (1 - step_size / 2 * PRECISIONS) * w + np.sqrt(step_size) * generator.standard_normal(w.shape)
        if step >= 0 and step % every == 0:
            draws.append(w)
    return np.stack(draws)


def test_errors_and_intervals_at_step_size_0_are_what_they_say():
    """Of 200 pairs of chain sets: 95 % intervals cover it (3 standard errors of a share), those of the step do not."""
    generator, pairs, num_draws = np.random.default_rng(2), 200, 96
    covered, plain, squares = np.zeros(2), np.zeros(2), np.zeros((2, 2))
    draws = [recursion(generator, halvings, pairs, num_draws) for halvings in (0, 1)]
    for pair in range(pairs):
        lambdas, chis = [], []
        for w in (found[:, pair] for found in draws):
            quadratic, chains = 0.5 * w**2 @ CURVATURES, []
            for c in range(4):
                moments = CoMoments.empty(c, num_draws, 1, len(SLOPES), 8)
                moments.update((w[:, c] @ OBSERVED)[:, None], w[:, c] @ SLOPES.T + quadratic[:, c, None])
                chains.append(moments)
            lambdas.append(llc(quadratic.T, INVERSE_TEMPERATURE))
            chis.append(susceptibility(chains))
        for row, (answers, true) in enumerate(((lambdas, AT_0[0]), (chis, AT_0[1][0]))):
            found = step_extrapolated(*answers)
            for counts, answer in ((covered, found.extrapolated), (plain, found.coarse)):
                low, high = (np.ravel(end)[0] for end in answer.interval())
                counts[row] += low <= true <= high
            answer = found.extrapolated
            errors = (
                (answer.value, answer.standard_error) if row == 0 else (answer.chi[0, 0], answer.standard_error[0, 0])
            )
            squares[row] += (errors[0] - true) ** 2, errors[1] ** 2
    assert (covered / pairs > 0.95 - 3 * np.sqrt(0.95 * 0.05 / pairs)).all()
    assert plain[0] / pairs < 0.2 and plain[1] / pairs < 0.9
    # Errors are the larger of two or three that are noisy themselves, so a little large: by up to a fourth here.
    actual, claimed = np.sqrt(squares / pairs).T
    spread = 3 / np.sqrt(2 * pairs)
    assert (actual / claimed < 1 + spread).all() and (actual / claimed > 0.8 * (1 - spread)).all()
