"""Susceptibilities that are known, and the weights that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from patterning_dist.response.moments import CoMoments
from patterning_dist.response.solver import solve_weights
from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.selftest.check import Check
from patterning_dist.selftest.copies import sample_copies

_PULL = 0.06  # eps * largest precision


def gaussian() -> Iterator[Check]:
    """Quadratic losses l_i = 1/2 (w - a_i)^T H_i (w - a_i): all is closed form.

    Cov(l_i, l_j) = 1/2 tr(H_i S H_j S) + g_i^T S g_j, S = (n_beta H + gamma)^-1, g_i = H_i (m - a_i), m the mean.
    """
    n_beta, gamma, num_samples, d = 40.0, 9.0, 4, 3
    generator = torch.Generator().manual_seed(1)
    roots = torch.randn(num_samples, d, d, generator=generator, dtype=torch.float64)
    hessians = roots @ roots.mT / d + 0.3 * torch.eye(d)
    optima = torch.randn(num_samples, d, generator=generator, dtype=torch.float64)
    center = torch.randn(d, generator=generator, dtype=torch.float64).float().double()
    precision = n_beta * hessians.mean(dim=0) + gamma * torch.eye(d)
    spread = torch.linalg.inv(precision)
    mean = spread @ (n_beta * (hessians @ optima[..., None]).mean(dim=0)[:, 0] + gamma * center)

    def losses(w: Tensor) -> Tensor:
        away = w[..., None, :] - optima.to(w)
        return 0.5 * torch.einsum("...id,ide,...ie->...i", away, hessians.to(w), away)

    slopes, turned = (hessians @ (mean - optima)[..., None])[..., 0], hessians @ spread
    covariance = 0.5 * torch.einsum("iab,jba->ij", turned, turned) + slopes @ spread @ slopes.T
    expected = -(covariance - covariance.mean(dim=1, keepdim=True))
    ends = torch.linalg.eigvalsh(precision)
    chains, _ = _chains(
        losses,
        lambda w: losses(w)[..., :1],
        center,
        Posterior(n_beta, gamma),
        step_size=_PULL / ends[-1].item(),
        relaxation=round(2 / _PULL * (ends[-1] / ends[0]).item()),
    )
    measured = susceptibility(chains)
    for sample in (0, 2):
        value, wanted = float(measured.chi[0, sample]), float(expected[0, sample])
        error = float(measured.standard_error[0, sample])
        allowance = (
            2 * _PULL / 4 * abs(wanted)
        )  # chi is quadratic in variances, which are 1 / (1 - eps P / 4) too large
        yield Check(f"chi of a Gaussian posterior, l_0 on sample {sample}", wanted, value, error, allowance)


def four_gon() -> Iterator[Check]:
    """The dead column W_4 of the 4-gon of toy superposition: five features, two dimensions, inputs x e_i, x ~ U[0, 1].

    l_i(W) = 1/3 [ (1 - |W_i|^2)^2 + sum_(j != i) max(W_j . W_i, 0)^2 ], so that L - L(w*) = |W_4|^4 / 15, and with
    d_j = W_j . W_4, c(t) = (t/5) (2 / 9 pi) E|W_4|^3 the responses -(t/5) Cov(phi, l_i) are -c for d_j under feature j,
    +c under the opposite one, and the weights of least norm for (d_0, d_1) = (1, 1) are 1 -+ 1/(2c). After Elliott &
    Murfet (arXiv 2605.07980); numbers by Murfet's github.com/timaeus-research/laplace, `Laplace/Patterning`.
    """
    for seed, t in enumerate((1000.0, 100.0)):
        stiffness = 0.8 * t * math.sqrt(15 / (math.pi * t))  # t E[L''] along W_4
        chains, heat = _chains(
            _feature_losses,
            lambda w: torch.cat([w, w.norm(dim=-1, keepdim=True)], dim=-1),
            torch.zeros(2),
            Posterior(t, 0.0),
            step_size=_PULL / stiffness,
            relaxation=round(2 / _PULL * 0.8 * 15 / math.pi),
            seed=seed,
        )
        # The last column does not vary: with all the weight of L on it, chi is the covariance itself.
        responses = t / 5 * susceptibility(chains, loss_weights=[0, 0, 0, 0, 0, 1]).chi_per_chain
        direction = (responses[:, 0, 2] - responses[:, 0, 0] + responses[:, 1, 3] - responses[:, 1, 1]) / 4
        c, error = _mean(direction)
        if t == 1000:
            yield Check("chi(d_j; h_j) of the 4-gon, t 1000", -0.310086, -c, error, 2 * heat * c)
            norm, its_error = _mean(responses[:, 2, 4])
            yield Check("chi(|W_4|; h_4) of the 4-gon, t 1000", 0.286178, norm, its_error, 2 * heat * norm)
            continue
        yield Check("c of the 4-gon, t 100", 0.174374, c, error, 2 * heat * c)
        wanted = 0.1  # small enough for weights above 0
        measured = susceptibility(chains, loss_weights=[1, 1, 1, 1, 1, 0])
        h = solve_weights(measured.chi[:2, :5], [wanted, wanted], inverse_temperature=t).weights - 1
        found = float(h[2] + h[3] - h[0] - h[1]) / (4 * wanted)
        name = "weights of the 4-gon, 1/(2c), t 100"
        yield Check(name, 1 / (2 * 0.174374), found, found * error / c, 2 * heat * found)


def _feature_losses(w: Tensor) -> Tensor:
    square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]).to(w)
    columns = torch.cat([square.expand(*w.shape[:-1], 4, 2), w[..., None, :]], dim=-2)
    products = columns @ columns.mT
    own = products.diagonal(dim1=-2, dim2=-1)
    return ((1 - own).square() + products.relu().square().sum(dim=-1) - own.square()) / 3


def _chains(
    losses: Callable[[Tensor], Tensor],
    observables: Callable[[Tensor], Tensor],
    center: Tensor,
    posterior: Posterior,
    *,
    step_size: float,
    relaxation: int,
    seed: int = 0,
) -> tuple[list[CoMoments], float]:
    """Co-moments of every copy, with a last column that does not vary, and the relative heat of the steps."""
    sampled = sample_copies(
        lambda w: losses(w).mean(dim=-1),
        center,
        posterior,
        step_size=step_size,
        relaxation=relaxation,
        number=64,
        num_draws=256,
        draws_apart=0.25,
        seed=seed,
    )
    w, at = sampled.positions, center.double()
    deviations = torch.nn.functional.pad(losses(w) - losses(at), (0, 1)).numpy()
    phi = (observables(w) - observables(at)).numpy()
    chains = []
    for chain, rows in enumerate(deviations):
        moments = CoMoments.empty(chain, len(rows), phi.shape[2], rows.shape[1])
        moments.update(phi[chain], rows)
        chains.append(moments)
    return chains, sampled.heat


def _mean(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
