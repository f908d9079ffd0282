"""The response-direction estimator: susceptibilities of a whole data pool for two forward passes an observable.

To first order in w, and for a Gaussian posterior (Stein's lemma),

    chi_i(phi) = -Cov(phi, l_i - L) ~ - grad (l_i - L)(w_bar) . c_phi ,     c_phi = Cov(w, phi) = Sigma E[grad phi]
    Sigma = ( n_beta H + gamma I )^-1

E[grad phi] is averaged over the draws of a chain, Sigma is applied by conjugate gradients with Hessian-vector products,
and the directional derivative is a central difference along u = c_phi / |c_phi|:

    - [ l_i(w_bar + s u) - l_i(w_bar - s u) ] / (2 s) * |c_phi|

Averages of gradients are far less noisy than covariances, but second-order parts of the covariance are missing: it is
always to be read beside the plain estimator on the same probe.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patterning_dist.models.components import Vector, axpy, scaled
from patterning_dist.sampling.layered import Prepared
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.target import Target


@dataclass(frozen=True)
class Solution:
    """What conjugate gradients found: A x = b up to ``relative_residual`` = |A x - b| / |b|.

    ``negative_curvature`` says that a direction with p . A p <= 0 was met and the iteration stopped before it: the
    localisation is then too weak for the loss to have a Gaussian posterior there.
    """

    vector: Vector
    num_iterations: int
    relative_residual: float
    negative_curvature: bool

    @property
    def ended(self) -> dict[str, Any]:
        """How, without the vector."""
        return {name: value for name, value in vars(self).items() if name != "vector"}


def conjugate_gradients(
    product: Callable[[Vector], Vector],
    right_side: Vector,
    dot: Callable[[Vector, Vector], float],
    *,
    max_iterations: int,
    tolerance: float,
) -> Solution:
    """Solve A x = b for a symmetric A given by its products (Hestenes & Stiefel, 1952).

    Args:
        product: v -> A v.
        right_side: b, parameter name -> tensor.
        dot: inner product of two vectors, over all ranks that share them.
        max_iterations: bound on the number of products.
        tolerance: stop at |A x - b| <= tolerance * |b|.

    Examples:
        >>> A, dot = torch.tensor([2.0, 4.0]), lambda u, v: float(u["w"] @ v["w"])
        >>> found = conjugate_gradients(
        ...     lambda v: {"w": A * v["w"]}, {"w": torch.tensor([2.0, 4.0])}, dot, max_iterations=10, tolerance=1e-6
        ... )
        >>> found.vector["w"].round(decimals=4)
        tensor([1., 1.])
    """
    x = {name: torch.zeros_like(b) for name, b in right_side.items()}
    residual = {name: b.clone() for name, b in right_side.items()}
    direction = dict(residual)
    squared = target = dot(residual, residual)
    iteration, negative = 0, False
    while iteration < max_iterations and squared > tolerance**2 * target:
        image = product(direction)
        curvature = dot(direction, image)
        iteration += 1
        if curvature <= 0:
            negative = True
            break
        length = squared / curvature
        x = axpy(length, direction, x)
        residual = axpy(-length, image, residual)
        squared, previous = dot(residual, residual), squared
        direction = axpy(squared / previous, direction, residual)
    return Solution(x, iteration, math.sqrt(squared / target) if target else 0.0, negative)


def response_direction(
    target: Target,
    posterior: Posterior,
    mean_gradient: Vector,
    samples: Prepared,
    *,
    max_iterations: int,
    tolerance: float,
) -> Solution:
    """c_phi = ( n_beta H + gamma I )^-1 E[grad phi] at the target's present position.

    On a chain group all ranks call this, each with its part of the vectors. Without iterations H is left out, which
    the residual then shows.

    Args:
        target: placed at the mean w_bar of the draws.
        posterior: n_beta and gamma.
        mean_gradient: E[grad phi] over the draws, nats per unit of weight.
        samples: training samples on which the Hessian H of the mean loss is taken.
        max_iterations, tolerance: of conjugate gradients.
    """

    def product(vector: Vector) -> Vector:
        curved = target.hessian_product(samples, vector)
        return {
            name: posterior.inverse_temperature * curved[name] + posterior.localization * v
            for name, v in vector.items()
        }

    if max_iterations == 0:
        vector = scaled(1 / posterior.localization, mean_gradient)
        missing = axpy(-1.0, product(vector), mean_gradient)
        squared = target.dot(mean_gradient, mean_gradient)
        residual = math.sqrt(target.dot(missing, missing) / squared) if squared else 0.0
        return Solution(vector, 0, residual, negative_curvature=False)
    return conjugate_gradients(product, mean_gradient, target.dot, max_iterations=max_iterations, tolerance=tolerance)


def directional_losses(
    target: Target, samples: Prepared, position: Vector, direction: Vector, *, step: float
) -> Tensor:
    """-grad l_i(w_bar) . c_phi for every loss of samples [sample] or [sample, position], by a central difference.

    The caller subtracts the mean over the pool, which turns l_i into l_i - L.

    Args:
        target: placed anywhere; left at ``position``.
        samples: of the pool.
        position: w_bar.
        direction: c_phi, same shapes.
        step: s, the length of the displacement in weight space.
    """
    norm = math.sqrt(target.dot(direction, direction))
    if norm == 0.0:
        target.move_to(position)
        return torch.zeros_like(target.losses(samples))
    sides = []
    for sign in (1.0, -1.0):
        target.move_to(axpy(sign * step / norm, direction, position))
        sides.append(target.losses(samples))
    target.move_to(position)
    return -(sides[0] - sides[1]) * (norm / (2 * step))
