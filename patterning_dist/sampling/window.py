"""The window: how far a training that goes on from a checkpoint moves the weights, before it is run.

T steps of an optimizer whose step is w <- w - f_t D g_t, with a metric D that is diagonal and stands still, follow

    dw/ds = - D ( g + H (w - w*) ) ,   s from 0 to tau = sum_t f_t
    w_T - w* = - D^1/2 F_tau(A) D^1/2 g ,   F_tau(x) = (1 - exp(-x tau)) / x ,   A = D^1/2 H D^1/2

where f_t is the schedule's factor. D is the learning rate for SGD; for AdamW the rate over sqrt(E g_B^2), with the
second moment of the minibatch gradients of the very loss that is trained, and decay c adds (c / p) w to the gradient
and c / p to H, p = 1 / sqrt(E g_B^2). F_tau(A) is applied by Lanczos steps (Golub & Meurant, 2010): unlike the
posterior's kernel 1 / (x + 1 / tau) it has no pole where the loss curves down. What is left out: the noise of
minibatches, whose effect on the mean is of second order in it, and the change of D along the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from patterning_dist.models.components import Vector, axpy
from patterning_dist.sampling.lanczos import lanczos, ritz

Product = Callable[[Vector], Vector]
Dot = Callable[[Vector, Vector], float]


@dataclass(frozen=True)
class Rule:
    """What an optimizer does with the gradient of one piece of the weights.

    Attributes:
        rate: at factor 1.
        decay: decoupled weight decay.
        stability: what AdamW adds to sqrt(E g^2); None: the step is along the gradient itself.
    """

    rate: float
    decay: float = 0.0
    stability: float | None = None


@dataclass(frozen=True)
class Move:
    """Where a window leads.

    Attributes:
        vector: w_T - w*.
        smallest: lowest Ritz value of A [1 / unit of s]: how fast the flow leaves along a direction of negative
            curvature, seen from the gradient.
        largest: highest one.
    """

    vector: Vector
    smallest: float
    largest: float


def metric(rules: Mapping[str, Rule], squares: Vector) -> tuple[Vector, Vector]:
    """D and c / p of every coordinate (see the module).

    Args:
        rules: piece -> what the optimizer does there.
        squares: E g_B^2, piece -> tensor.
    """
    inverse = {}  # 1 / p
    for name, v in squares.items():
        stability = rules[name].stability
        inverse[name] = torch.ones_like(v) if stability is None else v.sqrt() + stability
    return (
        {name: rules[name].rate / q for name, q in inverse.items()},
        {name: rules[name].decay * q for name, q in inverse.items()},
    )


def window_move(product: Product, gradient: Vector, rates: Vector, dot: Dot, *, tau: float, num_steps: int) -> Move:
    """- D^1/2 F_tau(A) D^1/2 g; see the module.

    Args:
        product: v -> H v; of the loss with its decay.
        gradient: g at the place where the window begins, likewise.
        rates: D, positive.
        dot: inner product over all ranks.
        tau: length of the window.
        num_steps: Hessian products.
    """
    root = {name: rate.sqrt() for name, rate in rates.items()}

    def scaled_product(vector: Vector) -> Vector:
        return _times(root, product(_times(root, vector)))

    start = _times(root, gradient)
    norm = math.sqrt(dot(start, start))
    moved = {name: torch.zeros_like(g) for name, g in gradient.items()}
    if norm == 0.0:
        return Move(moved, 0.0, 0.0)
    basis, alphas, betas = lanczos(scaled_product, start, dot, num_steps)
    values, vectors = (found.numpy() for found in ritz(alphas, betas))
    coefficients = -norm * vectors @ (window_kernel(values, tau) * vectors[0])
    for coefficient, vector in zip(coefficients.tolist(), basis, strict=True):
        moved = axpy(coefficient, vector, moved)
    return Move(_times(root, moved), float(values[0]), float(values[-1]))


def window_kernel(values: np.ndarray, tau: float) -> np.ndarray:
    """F_tau(x) = (1 - exp(-x tau)) / x, tau at x = 0."""
    x = np.asarray(values, float) * tau
    small = np.abs(x) < 1e-8
    return tau * np.where(small, 1 - x / 2, -np.expm1(-x) / np.where(small, 1.0, x))


def _times(x: Vector, y: Vector) -> Vector:
    return {name: x[name] * part for name, part in y.items()}
