"""The window: how far a training that goes on from a checkpoint moves the weights, before it is run.

T steps of an optimizer whose step is w <- w - f_t D g_t, with a metric D that is diagonal and stands still, follow

    dw/ds = - D ( g + H (w - w*) ) ,   s from 0 to tau = sum_t f_t
    w_T - w* = - D^1/2 F_tau(A) D^1/2 g ,   F_tau(x) = (1 - exp(-x tau)) / x ,   A = D^1/2 H D^1/2

where f_t is the schedule's factor. D is the learning rate for SGD; for AdamW the rate over sqrt(E g_B^2), with the
second moment of the minibatch gradients of the very loss that is trained, and decay c adds (c / p) w to the gradient
and c / p to H, p = 1 / sqrt(E g_B^2). F_tau(A) is applied by Lanczos steps (Golub & Meurant, 2010): unlike the
posterior's kernel 1 / (x + 1 / tau) it has no pole where the loss curves down. D changes along the way, and gradients
do beyond first order: both are left out.

Minibatches spread the ends of trainings round w_T with a covariance C, Sigma being that of a minibatch's gradient,

    C = D^1/2 V(A)^1/2 D^1/2 Sigma D^1/2 V(A)^1/2 D^1/2 ,   V(x) = sum_k (1 - x)^2k , k < T, less what passes without
                                                            replacement take away

(the stationary covariance of SGD, Mandt, Hoffman & Blei 2017, if Sigma and H commute). It is the error of a prediction
of one training; what it does to the mean, 1/2 tr(H C) and more, is left out as well.
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

_LEAST_MOMENT = 1e-2  # of the mean second moment of a row


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
class Steps:
    """Of a training.

    Attributes:
        number: T.
        factor: f, mean of the schedule's factors.
        a_pass: E, steps of a pass over the population without replacement.
    """

    number: int
    factor: float
    a_pass: float


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

    A second moment below a hundredth of its row's mean counts as that. Of a rare token's weights minibatches know one
    gradient or two, and where that is near zero the rate would have no bound: the training's would not stay so small.

    Args:
        rules: piece -> what the optimizer does there.
        squares: E g_B^2, piece -> tensor.
    """
    inverse = {}  # 1 / p
    for name, v in squares.items():
        stability = rules[name].stability
        floor = _LEAST_MOMENT * v.mean(dim=-1, keepdim=True) if v.dim() > 1 else torch.zeros_like(v)
        inverse[name] = torch.ones_like(v) if stability is None else v.maximum(floor).sqrt() + stability
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
    moved, values = _applied(product, gradient, rates, dot, lambda x: -window_kernel(x, tau), num_steps)
    return Move(moved, float(values[0]), float(values[-1]))


def window_spread(product: Product, noise: Vector, rates: Vector, dot: Dot, steps: Steps, num_products: int) -> Vector:
    """D^1/2 V(A)^1/2 D^1/2 u: a draw of covariance C, see the module.

    Args:
        product: v -> H v; of the loss with its decay.
        noise: u, a draw of covariance Sigma.
        rates: D, positive.
        dot: inner product over all ranks.
        steps: of the training.
        num_products: Hessian products.
    """
    return _applied(product, noise, rates, dot, lambda x: np.sqrt(spread_kernel(x, steps)), num_products)[0]


def _applied(
    product: Product,
    vector: Vector,
    rates: Vector,
    dot: Dot,
    kernel: Callable[[np.ndarray], np.ndarray],
    num_products: int,
) -> tuple[Vector, np.ndarray]:
    """D^1/2 kernel(A) D^1/2 v, and the Ritz values of A."""
    root = {name: rate.sqrt() for name, rate in rates.items()}

    def scaled_product(vector: Vector) -> Vector:
        return _times(root, product(_times(root, vector)))

    start = _times(root, vector)
    norm = math.sqrt(dot(start, start))
    found = {name: torch.zeros_like(v) for name, v in vector.items()}
    if norm == 0.0:
        return found, np.zeros(1)
    basis, alphas, betas = lanczos(scaled_product, start, dot, num_products)
    values, vectors = (part.numpy() for part in ritz(alphas, betas))
    coefficients = norm * vectors @ (kernel(values) * vectors[0])
    for coefficient, vector in zip(coefficients.tolist(), basis, strict=True):
        found = axpy(coefficient, vector, found)
    return _times(root, found), values


def window_kernel(values: np.ndarray, tau: float) -> np.ndarray:
    """F_tau(x) = (1 - exp(-x tau)) / x, tau at x = 0."""
    x = np.asarray(values, float) * tau
    small = np.abs(x) < 1e-8
    return tau * np.where(small, 1 - x / 2, -np.expm1(-x) / np.where(small, 1.0, x))


def spread_kernel(values: np.ndarray, steps: Steps) -> np.ndarray:
    """V(x) = f^2 [ sum_k a^2k - sum over passes (sum over the steps k of a pass of a^k)^2 / E ] , a = 1 - f x, k < T.

    Minibatches of a pass of E steps add up to the population, so that their noise is that of a sum that is fixed.
    """
    # Where f x > 1 a step overshoots, and the noise of the last one alone is counted.
    decay = 1.0 - np.minimum(steps.factor * np.asarray(values, float), 1.0)
    num_passes, rest = divmod(steps.number, steps.a_pass)
    shared = _geometric(decay, rest) ** 2
    if num_passes:
        earlier = decay ** (2 * rest) * _geometric(decay ** (2 * steps.a_pass), num_passes)
        shared = shared + _geometric(decay, steps.a_pass) ** 2 * earlier
    return steps.factor**2 * np.maximum(_geometric(decay**2, steps.number) - shared / steps.a_pass, 0.0)


def _geometric(ratio: np.ndarray, number: float) -> np.ndarray:
    """sum_k ratio^k, k < number."""
    is_one = np.abs(ratio - 1) < 1e-9
    return np.where(is_one, number, (1 - ratio**number) / np.where(is_one, 1.0, 1 - ratio))


def _times(x: Vector, y: Vector) -> Vector:
    return {name: x[name] * part for name, part in y.items()}
