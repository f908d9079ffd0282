"""Local learning coefficients that are known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor

from patterning_dist.response.llc import llc, trace_mean
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.selftest.check import Check
from patterning_dist.selftest.copies import Copies, means_of_groups, sample_copies

_PULL = 0.2  # eps * largest precision P: the variance there is 1 / (1 - eps P / 4) times the posterior's


def stretched_gaussian() -> Iterator[Check]:
    """1/2 sum_i t lambda_i / (t lambda_i + gamma), lambda from 1 to kappa = 100 in 10 even steps of its logarithm."""
    t, curvatures = 100.0, torch.logspace(0, 2, 10, dtype=torch.float64)
    for relative, expected in {100: 0.8002, 10: 2.5, 1: 4.1998, 0: 5.0}.items():
        precisions = t * (curvatures + relative)
        sampled = sample_copies(
            lambda w: 0.5 * (w.square() * curvatures.to(w)).sum(dim=-1),
            torch.zeros(10),
            Posterior(t, relative * t),
            step_size=_PULL / precisions.max().item(),
            relaxation=round(2 / _PULL * (precisions.max() / precisions.min()).item()),
            seed=relative,
        )
        yield _check(f"LLC of a stretched Gaussian, gamma {relative} t", expected, sampled, t)


def powers() -> Iterator[Check]:
    """1/(2k) for L = x^2k, at every t where nothing localises: x dL/dx = 2k L, and t E[x dL/dx] = 1 by parts."""
    t = 100.0

    def power(k: int, w: Tensor) -> Tensor:
        return w[..., 0] ** (2 * k)

    for k in (2, 3):
        slope, width = 1 - 1 / (2 * k), t ** (1 / k)  # of E |x|^m under exp(-t x^2k): Gamma functions
        stiffness = 2 * k * (2 * k - 1) * width * math.gamma(slope) / math.gamma(1 / (2 * k))  # t E[L'']
        spread = math.gamma(3 / (2 * k)) / math.gamma(1 / (2 * k)) / width  # E[x^2]
        sampled = sample_copies(
            partial(power, k),
            torch.zeros(1),
            Posterior(t, 0.0),
            step_size=0.03 / stiffness,
            relaxation=round(2 / 0.03 * stiffness * spread),
            number=1024,
            num_draws=32,
        )
        yield _check(f"LLC of x^{2 * k}", 1 / (2 * k), sampled, t)


def reduced_rank() -> Iterator[Check]:
    """y = B A x with M inputs, H hidden units, N outputs and a true map of rank r, unit noise: 1/2 |B A - C|^2.

    Values by the main theorem of Aoyagi & Watanabe, Neural Networks 18 (2005). They are those of the limit: at n_beta /
    gamma^2 = 100 the LLC is up to some 5 % off.
    """
    posterior = Posterior(400.0, 2.0)
    for (m, h, n, r), expected in {(4, 1, 4, 1): 3.5, (4, 3, 4, 1): 6.0}.items():
        a, b = torch.zeros(h, m), torch.zeros(n, h)
        a[:r, :r] = b[:r, :r] = torch.eye(r) * 2 / math.sqrt(posterior.localization)
        truth, split = b @ a, h * m

        def loss(w: Tensor, truth: Tensor = truth, split: int = split, h: int = h) -> Tensor:
            product = w[..., split:].unflatten(-1, (-1, h)) @ w[..., :split].unflatten(-1, (h, -1))
            return 0.5 * (product - truth.to(w)).square().sum(dim=(-2, -1))

        sampled = sample_copies(
            loss, torch.cat([a.flatten(), b.flatten()]), posterior, step_size=6e-5, relaxation=1000, number=128
        )
        name = f"LLC of a reduced-rank regression, {m}-{h}-{n}, rank {r}"
        yield _check(name, expected, sampled, posterior.inverse_temperature, left_open=0.05)


def diabetes() -> Iterator[Check]:
    """Least squares on ten standardised features of 442 patients (Efron et al., 2004), around its minimum.

    1/2 tr(t H S) and 1/2 tr(H S H S), S = (t H + gamma)^-1, H the correlation matrix of the features.
    """
    x, y = (torch.from_numpy(values) for values in load_diabetes(return_X_y=True, scaled=False))
    x, y = (x - x.mean(dim=0)) / x.std(dim=0, correction=0), (y - y.mean()) / y.std(correction=0)
    t, precisions = 100.0, 100 * torch.linalg.eigvalsh(x.T @ x / len(x)) + 1
    sampled = sample_copies(
        lambda w: 0.5 * (y.to(w) - w @ x.T.to(w)).square().mean(dim=-1),
        torch.linalg.lstsq(x, y[:, None]).solution[:, 0],
        Posterior(t, 1.0),
        step_size=_PULL / precisions.max().item(),
        relaxation=round(2 / _PULL * (precisions.max() / precisions.min()).item()),
        number=128,
        num_draws=32,
        draws_apart=0.1,
    )
    yield _check("LLC of a regression on the diabetes data", 4.624127, sampled, t)
    variance = trace_mean(means_of_groups((sampled.losses - sampled.losses.mean()) ** 2))
    name = "Var L of a regression on the diabetes data"
    yield Check(name, 4.400580e-4, variance.value, variance.standard_error, 2 * sampled.heat * variance.value)


def _check(name: str, expected: float, sampled: Copies, inverse_temperature: float, left_open: float = 0.0) -> Check:
    found = llc(means_of_groups(sampled.losses), inverse_temperature)
    return Check(name, expected, found.value, found.standard_error, (sampled.heat + left_open) * expected)
