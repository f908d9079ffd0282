"""The window: how far a training that goes on from a checkpoint moves the weights, before it is run.

Step t of an optimizer, of factor f_t, with momentum b and a metric D that is diagonal,

    m_t = b m_(t-1) + (1 - b) (g + H (w - w*)) ,   dw/ds = - f_t D m_t / (1 - b^t) ,   s from 0 to 1

is linear in g and in m_0, in every eigenvalue x of A = D^1/2 H D^1/2 by itself (``sampling.steps``: k_s(x) and J(x)):

    w_T - w* = D^1/2 ( sum_s k_s(A) D^1/2 g + J(A) D^1/2 m_0 )

Without momentum, SGD, that is the flow: - sum_s k_s(x) = (1 - exp(-x tau)) / x , tau = sum_t f_t. AdamW's b = beta_1
makes it late: of 20 steps the gradient of the first counts 2.9 times, that of the last .11 times, so that curvature has
hardly begun to hold the weights back when they end. What the flow says of them was missed by up to a factor of 1.8.

D is the learning rate for SGD; for AdamW the rate over the root of the second moment (Kingma & Ba, 2015),

    v_t = (1 - beta_2) sum_s beta_2^(t-s) E g_B^2(s) / (1 - beta_2^t) ,

of the minibatch gradients of the very loss that is trained, and decay c adds (c / p) w to the gradient and c / p to H,
p = 1 / sqrt(v). AdamW's own is a mean of t gradients, some of which are m_t's. To second order in how it fluctuates
that takes (1 - r)(1 - 3 r) / 4t of step t, for normal gradients of whose second moment the mean makes up r: a few
percent of 20 steps at most. It is left out, and so are gradients beyond first order.

Functions of A are applied by Lanczos steps (Golub & Meurant, 2010): unlike the posterior's kernel 1 / (x + 1 / tau)
these have no pole where the loss curves down.

Minibatches spread the ends of trainings round w_T with a covariance C, Sigma being that of a minibatch's gradient,

    C = D^1/2 V(A)^1/2 D^1/2 Sigma D^1/2 V(A)^1/2 D^1/2 ,   V(x) = sum_s k_s(x)^2 , less what passes without replacement
                                                            take away

(the stationary covariance of SGD, Mandt, Hoffman & Blei 2017, if Sigma and H commute). It is the error of a prediction
of one training; what it does to the mean, 1/2 tr(H C) and more, is left out as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from patterning_dist.models.components import Vector, axpy, scaled
from patterning_dist.sampling.lanczos import lanczos, ritz
from patterning_dist.sampling.steps import Steps, responses, spread_kernel

Product = Callable[[Vector], Vector]
Dot = Callable[[Vector, Vector], float]

_LEAST_MOMENT = 1e-2  # of the mean second moment of a row


@dataclass(frozen=True)
class Rule:
    """What an optimizer does with the gradient of one piece of the weights.

    Attributes:
        rate: at factor 1.
        decay: decoupled weight decay.
        stability: what AdamW adds to sqrt(v); None: the step is along the gradient itself.
        memory: beta_2.
    """

    rate: float
    decay: float = 0.0
    stability: float | None = None
    memory: float = 0.0


@dataclass(frozen=True)
class Move:
    """Where a window leads.

    Attributes:
        vector: w_T - w*.
        momentum: m_T.
        smallest: lowest Ritz value of A [1 / unit of s]: how fast the flow leaves along a direction of negative
            curvature, seen from the gradient.
        largest: highest one.
    """

    vector: Vector
    momentum: Vector
    smallest: float
    largest: float


def metric(rules: Mapping[str, Rule], squares: Vector) -> tuple[Vector, Vector]:
    """D and c / p of every coordinate (see the module).

    A second moment below a hundredth of its row's mean counts as that. Of a rare token's weights minibatches know one
    gradient or two, and where that is near zero the rate would have no bound: the training's would not stay so small.

    Args:
        rules: piece -> what the optimizer does there.
        squares: v, piece -> tensor.
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


def second_moments(rules: Mapping[str, Rule], squares: Vector, before: Vector, steps: Steps) -> tuple[Vector, Vector]:
    """Mean of v_t over the steps, by their factors, and the sum that the second moments of later ones begin with.

    Args:
        rules: piece -> what the optimizer does there.
        squares: E g_B^2 during these steps.
        before: (1 - beta_2) sum_s beta_2^(t-s) E g_B^2(s) of the steps before them; 0 of a fresh optimizer.
        steps: of the training.
    """
    mean, after = {}, {}
    for name, q in squares.items():
        memory = rules[name].memory
        kept = memory ** (steps.numbers - steps.before)
        corrections = steps.factors / steps.factors.sum() / (1 - memory**steps.numbers)
        mean[name] = float(corrections @ kept) * before[name] + float(corrections @ (1 - kept)) * q
        after[name] = float(kept[-1]) * before[name] + float(1 - kept[-1]) * q
    return mean, after


def window_move(
    product: Product, gradient: Vector, momentum: Vector, rates: Vector, dot: Dot, steps: Steps, num_products: int
) -> Move:
    """D^1/2 (sum_s k_s(A) D^1/2 g + J(A) D^1/2 m_0), and likewise m_T; see the module.

    Of what m_0 has outside the space that the products span no curvature is known: it counts as 0.

    Args:
        product: v -> H v; of the loss with its decay.
        gradient: g at the place where the window begins, likewise.
        momentum: m_0.
        rates: D, positive.
        dot: inner product over all ranks.
        steps: of the window.
        num_products: Hessian products.
    """
    root = {name: rate.sqrt() for name, rate in rates.items()}
    space = _Krylov(product, gradient, root, dot, num_products)
    start = _times(root, momentum)
    inside = space.coordinates(start, dot)
    outside = axpy(-1.0, space.vector(inside, start), start)
    found = list[Vector]()
    for of_position, of_momentum in ((1.0, 0.0), (0.0, 1.0)):
        by_gradient, by_momentum = responses(np.append(space.values, 0.0), steps, of_position, of_momentum)
        within = by_gradient.sum(axis=0)[:-1] * space.start + by_momentum[:-1] * inside
        found.append(axpy(float(by_momentum[-1]), outside, space.vector(within, start)))
    smallest, largest = (float(space.values[k]) if len(space.values) else 0.0 for k in (0, -1))
    after = {name: m / root[name] for name, m in found[1].items()}
    return Move(_times(root, found[0]), after, smallest, largest)


def window_spread(
    product: Product, noise: Vector, rates: Vector, dot: Dot, steps: Steps, a_pass: float, num_products: int
) -> Vector:
    """D^1/2 V(A)^1/2 D^1/2 u: a draw of covariance C, see the module.

    Args:
        product: v -> H v; of the loss with its decay.
        noise: u, a draw of covariance Sigma.
        rates: D, positive.
        dot: inner product over all ranks.
        steps: of the training, all of them.
        a_pass: E, steps of a pass over the population without replacement.
        num_products: Hessian products.
    """
    root = {name: rate.sqrt() for name, rate in rates.items()}
    space = _Krylov(product, noise, root, dot, num_products)
    spread = np.sqrt(spread_kernel(space.values, steps, a_pass))
    return _times(root, space.vector(spread * space.start, noise))


class _Krylov:
    """The space of D^1/2 v and its first products with A, spanned by the eigenvectors of A restricted to it.

    Attributes:
        values: eigenvalues there, ascending; none where v is 0.
        start: D^1/2 v in these vectors.
    """

    def __init__(self, product: Product, vector: Vector, root: Vector, dot: Dot, num_products: int) -> None:
        start = _times(root, vector)
        norm = math.sqrt(dot(start, start))
        self._basis, self.values, self._vectors = list[Vector](), np.zeros(0), np.zeros((0, 0))
        if norm > 0:
            self._basis, alphas, betas = lanczos(
                lambda v: _times(root, product(_times(root, v))), start, dot, num_products
            )
            self.values, self._vectors = (part.numpy() for part in ritz(alphas, betas))
        self.start = norm * self._vectors[:1].sum(axis=0)

    def coordinates(self, vector: Vector, dot: Dot) -> np.ndarray:
        """The part of a vector that lies in the space."""
        return self._vectors.T @ np.array([dot(q, vector) for q in self._basis])

    def vector(self, coordinates: np.ndarray, like: Vector) -> Vector:
        """The vector of these coordinates, of the shapes of another one."""
        found = scaled(0.0, like)
        for coefficient, q in zip((self._vectors @ coordinates).tolist(), self._basis, strict=True):
            found = axpy(coefficient, q, found)
        return found


def _times(x: Vector, y: Vector) -> Vector:
    return {name: x[name] * part for name, part in y.items()}
