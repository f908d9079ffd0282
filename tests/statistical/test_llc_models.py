"""The LLC of singular models whose learning coefficient is known, sampled with SGLD from a true minimum.

What a chain estimates is not lambda but n_beta E[L - L(w*)] at a finite n_beta and gamma, which tends to lambda as n =
n_beta / gamma^(degree / 2) grows: like n^-(lambda' - lambda) with lambda' of the next stratum, or like 1 / log n where
the multiplicity m is 2. All cases here have m = 1, and n large enough for a few percent; where the value at finite n is
an integral in one or two dimensions, it is compared as well.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from patterning_dist.response.llc import llc
from patterning_dist.sampling import sgld
from patterning_dist.sampling.posterior import Posterior


def sample(loss_and_gradient, center, posterior, step_size, *, burn_in, num_draws, steps_between_draws, num_chains):
    """Losses L - L(w*) of chains that start at w* and advance together, [chain, draw]; float32, as in a study."""
    generator = torch.Generator().manual_seed(0)
    centers = {"w": center.float().expand(num_chains, *center.shape).clone()}
    state, losses = sgld.init({"w": centers["w"].clone()}), []
    for step in range(burn_in + num_draws * steps_between_draws):
        loss, gradient = loss_and_gradient(state.position["w"])
        if step >= burn_in and (step - burn_in) % steps_between_draws == 0:
            losses.append(loss)
        noise = {"w": torch.randn(centers["w"].shape, generator=generator)}
        state = sgld.step_(state, {"w": gradient}, noise, center=centers, posterior=posterior, step_size=step_size)
    return torch.stack(losses, dim=1).double().numpy()


def crossing(exponents):
    """L = prod_j w_j^(2 k_j) and its gradient, w [chain, coordinate]."""
    powers = [2 * k for k in exponents]

    def loss_and_gradient(w):
        columns = w.unbind(1)
        factors = [column**power for column, power in zip(columns, powers, strict=True)]
        slopes = [power * column ** (power - 1) for column, power in zip(columns, powers, strict=True)]
        gradient = [math.prod([*factors[:j], slope, *factors[j + 1 :]]) for j, slope in enumerate(slopes)]
        return math.prod(factors), torch.stack(gradient, dim=1)

    return loss_and_gradient


def crossing_at_finite_temperature(exponents, inverse_temperature, localization):
    """n_beta E[L] of a crossing in one or two dimensions, by quadrature."""
    grid = np.geomspace(1e-8, 9, 2500) / np.sqrt(localization)  # one orthant is enough
    w = np.meshgrid(*[grid] * len(exponents), indexing="ij")
    loss = np.prod([x ** (2 * k) for x, k in zip(w, exponents, strict=True)], axis=0)
    log_density = -inverse_temperature * loss - localization / 2 * sum(x**2 for x in w) + sum(map(np.log, w))
    density = np.exp(log_density - log_density.max())
    return inverse_temperature * (density * loss).sum() / density.sum()


# k, n_beta, gamma, eps * gamma, burn-in, draws, steps between draws
CROSSINGS = [
    ((2,), 9000.0, 3.0, 3e-4, 3000, 100, 60),
    ((3,), 27_000.0, 3.0, 3e-4, 3000, 100, 60),
    ((1, 2), 162_000.0, 3.0, 1e-5, 60_000, 200, 300),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exponents", "inverse_temperature", "localization", "pull", "burn_in", "num_draws", "steps_between_draws"),
    CROSSINGS,
)
def test_normal_crossings(exponents, inverse_temperature, localization, pull, burn_in, num_draws, steps_between_draws):
    losses = sample(
        crossing(exponents),
        torch.zeros(len(exponents)),
        Posterior(inverse_temperature, localization),
        pull / localization,
        burn_in=burn_in,
        num_draws=num_draws,
        steps_between_draws=steps_between_draws,
        num_chains=512,
    )
    found = llc(losses, inverse_temperature)
    finite = crossing_at_finite_temperature(exponents, inverse_temperature, localization)
    # The step's own bias is one or two percent.
    assert abs(found.value - finite) < 4.5 * found.standard_error + 0.02 * finite
    assert found.standard_error < 0.02 * found.value
    assert found.value == pytest.approx(min(1 / (2 * k) for k in exponents), rel=0.1)


def aoyagi(num_inputs, num_hidden, num_outputs, rank):
    """(lambda, m) of reduced-rank regression y = B A x + noise with a true map of rank r.

    Aoyagi & Watanabe, "Stochastic complexities of reduced rank regression in Bayesian estimation", Neural Networks 18
    (2005), main theorem: M inputs, H hidden units, N outputs.
    """
    m, h, n, r = num_inputs, num_hidden, num_outputs, rank
    if n + r <= m + h and m + r <= n + h and h + r <= m + n:
        odd = (m + h + n + r) % 2
        return (odd - (h + r) ** 2 - m**2 - n**2 + 2 * (h + r) * (m + n) + 2 * m * n) / 8, 1 + odd
    if m + h < n + r:
        return (h * m - h * r + n * r) / 2, 1
    if n + h < m + r:
        return (h * n - h * r + m * r) / 2, 1
    return m * n / 2, 1  # m + n < h + r


def test_aoyagi_s_formula_at_known_points():
    assert aoyagi(1, 1, 1, 0) == (0.5, 2)  # (a b)^2
    assert aoyagi(3, 1, 1, 0) == (0.5, 1)  # a^2 |b|^2 with b in R^3: the axis a = 0
    assert aoyagi(2, 2, 2, 2) == (2.0, 1)  # full rank: regular, 4 directions of B A
    assert aoyagi(4, 1, 4, 1) == (3.5, 1)  # rank = hidden: regular, M + N - 1 directions
    assert aoyagi(2, 6, 2, 0) == (2.0, 1)  # many hidden units: all of B A
    assert aoyagi(4, 3, 4, 1) == (6.0, 1)


@pytest.mark.slow
def test_reduced_rank_regression():
    num_inputs, num_hidden, num_outputs, rank = 4, 3, 4, 1
    inverse_temperature, localization = 400.0, 2.0
    # x ~ N(0, I), unit noise: the population loss over its minimum is 1/2 |B A - C|^2. w* is the deepest singularity:
    # every hidden unit that C does not need is dead on both sides.
    scale = 2.0 / np.sqrt(localization)
    a, b = torch.zeros(num_hidden, num_inputs), torch.zeros(num_outputs, num_hidden)
    a[0, 0] = b[0, 0] = scale
    target = b @ a

    def loss_and_gradient(w):
        a = w[:, :a_size].reshape(-1, num_hidden, num_inputs)
        b = w[:, a_size:].reshape(-1, num_outputs, num_hidden)
        residual = b @ a - target
        gradient = torch.cat([(b.mT @ residual).flatten(1), (residual @ a.mT).flatten(1)], dim=1)
        return 0.5 * residual.square().sum(dim=(1, 2)), gradient

    a_size = a.numel()
    center = torch.cat([a.flatten(), b.flatten()])
    assert torch.linalg.matrix_rank(target) == rank
    losses = sample(
        loss_and_gradient,
        center,
        Posterior(inverse_temperature, localization),
        5e-5,
        burn_in=20_000,
        num_draws=100,
        steps_between_draws=150,
        num_chains=128,
    )
    found = llc(losses, inverse_temperature)
    known, multiplicity = aoyagi(num_inputs, num_hidden, num_outputs, rank)
    assert (known, multiplicity) == (6.0, 1)
    assert known < center.numel() / 2 - 4.5 * found.standard_error  # 12: not a regular model
    assert found.standard_error < 0.02 * known
    assert found.value == pytest.approx(known, rel=0.1)
