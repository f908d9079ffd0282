"""The ends of a symmetric operator's spectrum from a few of its products (Lanczos, 1950)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from patterning_dist.models.components import Vector, axpy, scaled
from patterning_dist.sampling.layered import Prepared
from patterning_dist.sampling.noise import Noise
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.target import Target

# A Krylov space that closes: what is left of A v after orthogonalisation is the rounding of float32 vectors.
_CLOSED = 1e-5
NUM_STIFF = 4  # directions at most that count as the stiff ones, of at least half the largest precision


def lanczos(
    product: Callable[[Vector], Vector], start: Vector, dot: Callable[[Vector, Vector], float], num_steps: int
) -> tuple[list[Vector], list[float], list[float]]:
    """A Q = Q T + beta_m q_(m+1) e_m^T: an orthonormal basis Q of {b, A b, A^2 b, ...}, in which A is tridiagonal.

    Every vector is orthogonalised twice against all before it, so that Q is orthonormal to the rounding of its tensors
    ("twice is enough", Kahan & Parlett): it holds as many vectors as there are steps.

    Args:
        product: v -> A v, A symmetric in ``dot``.
        start: b, not 0.
        dot: inner product of two vectors, over all ranks that share them; every rank calls it as often.
        num_steps: m, products with A; fewer where the space closes before.

    Returns:
        Basis q_1..q_m, alphas T_kk, and betas: T_k,k+1, the last of them beta_m, the norm of what T leaves out.
    """
    basis, alphas, betas = [scaled(1 / math.sqrt(dot(start, start)), start)], list[float](), list[float]()
    while True:
        image = product(basis[-1])
        alphas.append(dot(basis[-1], image))
        size = math.sqrt(dot(image, image))
        for _ in range(2):
            for q in basis:
                image = axpy(-dot(q, image), q, image)
        betas.append(math.sqrt(dot(image, image)))
        if len(alphas) == num_steps or betas[-1] <= _CLOSED * size:
            return basis, alphas, betas
        basis.append(scaled(1 / betas[-1], image))


def ritz(alphas: list[float], betas: list[float]) -> tuple[Tensor, Tensor]:
    """Eigenvalues of T, ascending, and its eigenvectors as columns [step, eigenvalue], float64.

    An eigenvalue of A lies within |beta_m * last entry of the eigenvector| of each.

    Examples:
        >>> A, dot = torch.tensor([1.0, 3.0]), lambda u, v: float(u["w"] @ v["w"])
        >>> _, alphas, betas = lanczos(lambda v: {"w": A * v["w"]}, {"w": torch.ones(2)}, dot, num_steps=2)
        >>> ritz(alphas, betas)[0].round(decimals=4)  # two products know a matrix of two eigenvalues
        tensor([1., 3.], dtype=torch.float64)
    """
    inner = torch.tensor(betas[:-1], dtype=torch.float64)
    matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64)) + torch.diag(inner, 1) + torch.diag(inner, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


class SpectrumEnds(NamedTuple):
    """Smallest and largest Ritz value of n_beta H + gamma, and bounds on their errors.

    Ritz values lie inside the spectrum: the largest eigenvalue is no smaller than ``largest``, the smallest no larger
    than ``smallest``.
    """

    smallest: float
    largest: float
    smallest_error: float
    largest_error: float


def spectrum_ends(
    target: Target, posterior: Posterior, samples: Prepared, num_steps: int, seed: int
) -> tuple[SpectrumEnds, Vector]:
    """The stiffest and the softest direction of U(w) = n_beta L(w) + gamma/2 |w - w*|^2 at the target's position.

    ``sgld`` and ``sgnht`` are stable while eps * largest < 4, and have 1 / (1 - eps P / 4) times the posterior's
    variance in a direction of precision P. Where ``smallest`` is negative the posterior has no Gaussian near w*.

    Args:
        target: at w*; on a chain group all ranks call this.
        posterior: n_beta and gamma.
        samples: training samples that the Hessian H of the mean loss is taken on.
        num_steps: Hessian products.
        seed: of the random vector that the products begin with.

    Returns:
        The ends, and the stiffest Ritz vectors: orthonormal, piece name -> [direction, *its shape].
    """

    def product(vector: Vector) -> Vector:
        curved = target.hessian_product(samples, vector)
        return {n: posterior.inverse_temperature * curved[n] + posterior.localization * v for n, v in vector.items()}

    shapes = {name: tuple(w.shape) for name, w in target.center.items()}
    start = dict(Noise(seed, 0, 0, target.extents, shapes, target.device))
    basis, alphas, betas = lanczos(product, start, target.dot, min(num_steps, sum(target.totals.values())))
    values, vectors = ritz(alphas, betas)
    errors = (betas[-1] * vectors[-1]).abs()
    top = vectors[:, values >= min(values[-1].item() / 2, values[-1].item())][:, -NUM_STIFF:].float()
    stiff = {
        name: torch.tensordot(top.T.to(target.device), torch.stack([q[name] for q in basis]), dims=1) for name in start
    }
    return SpectrumEnds(values[0].item(), values[-1].item(), errors[0].item(), errors[-1].item()), stiff
