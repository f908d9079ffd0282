"""The dual of the bounded weight problem, solved by a semismooth Newton method.

    min 1/2 |h|^2 + 1/(2 tau) |R h - c|^2   or   s.t. R h = c;   with sum h = 0 and low <= h <= high

R = the centred rows of chi (or a projection of them), so that R h = chi h whenever sum h = 0. With Q the rows
of R turned and scaled to Q Q^T / n = I and a last row of ones, the dual function of nu (one entry a row of Q)

    f(nu) = 1/n sum_i psi(q_i . nu) + 1/2 nu^T P nu - beta . nu,   psi(y) = max_{low <= h <= high} h y - h^2/2

is convex, once differentiable and piecewise quadratic, and its minimiser gives h_i = clip(q_i . nu, low,
high). P = 0 for equalities. One evaluation is one pass over the columns, in chunks that fit a processor's
cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from patterning_dist.errors import PatterningError
from patterning_dist.response.moments import Floats

CHUNK = 1 << 16
RESIDUAL = 1e-11  # of the largest entry of beta; Newton on a piecewise linear equation ends at rounding
MAX_ITERATIONS = 200
GAP = 1e-7  # relative, of the largest feasible strength


class Dual(Protocol):
    """What the minimisation below asks of a problem: `Problem` here, or `GroupedProblem` of ``response.grouped``."""

    def evaluate(self, dual: Floats) -> tuple[Floats, Floats]: ...
    def support(self, dual: Floats) -> float: ...


@dataclass(frozen=True)
class Problem:
    """Column shards [observable, sample] of chi, and q = turn @ (chi - row_mean), one row of ones last."""

    shards: Sequence[np.ndarray]
    row_mean: Floats  # observable
    turn: Floats  # direction observable
    penalty: Floats  # dual dual, P above
    low: float
    high: float

    @property
    def num_samples(self) -> int:
        return sum(shard.shape[1] for shard in self.shards)

    def scores(self, shard: np.ndarray, dual: Floats) -> Floats:
        """q_i . nu of the columns of one shard. [sample]"""
        slope = dual[:-1] @ self.turn
        return slope @ shard + (dual[-1] - slope @ self.row_mean)

    def evaluate(self, dual: Floats) -> tuple[Floats, Floats]:
        """Gradient and generalised Hessian of f at nu, without the linear term beta . nu."""
        num_rows = len(self.row_mean) + 1
        response, curvature = np.zeros(num_rows), np.zeros((num_rows, num_rows))
        for shard in chunks(self.shards):
            score = self.scores(shard, dual)
            h = np.clip(score, self.low, self.high)
            rows = np.vstack([shard - self.row_mean[:, None], np.ones_like(score)])
            response += rows @ h
            free = rows[:, h == score]
            curvature += free @ free.T
        turn = np.eye(len(dual), num_rows)
        turn[:-1, :-1], turn[:-1, -1], turn[-1, :-1], turn[-1, -1] = self.turn, 0.0, 0.0, 1.0
        gradient = turn @ response / self.num_samples + self.penalty @ dual
        return gradient, turn @ curvature @ turn.T / self.num_samples + self.penalty

    def support(self, dual: Floats) -> float:
        """1/n sum_i max(low q_i.nu, high q_i.nu): no h within the bounds has 1/n h.(Q^T nu) above this."""
        total = 0.0
        for shard in chunks(self.shards):
            score = self.scores(shard, dual)
            total += float(np.maximum(self.low * score, self.high * score).sum())
        return total / self.num_samples

    def intervention(self, dual: Floats) -> Floats:
        """h [sample]."""
        parts = [np.clip(self.scores(shard, dual), self.low, self.high) for shard in self.shards]
        return np.concatenate(parts)

    def settled(self, h: Floats) -> Floats:
        """h with the last rounding of its sum spread over the free entries. [sample]"""
        free = (h > self.low) & (h < self.high)
        return np.where(free, np.clip(h - h.sum() / max(np.count_nonzero(free), 1), self.low, self.high), h)


def chunks(shards: Sequence[np.ndarray]) -> Iterator[Floats]:
    """Float64 pieces of the column shards."""
    for shard in shards:
        for start in range(0, shard.shape[1], CHUNK):
            yield np.asarray(shard[:, start : start + CHUNK], np.float64)


def minimise(problem: Dual, beta: Floats, start: Floats, basis: Floats) -> tuple[Floats, Floats, int]:
    """Minimise f(nu) - beta . nu over start + span(basis columns).

    Returns nu, the full gradient there and the number of iterations; the caller judges the gradient.
    """
    dual = start
    gradient, hessian = problem.evaluate(dual)
    scale = max(float(np.abs(gradient - beta).max()), float(np.abs(beta).max()), 1e-300)
    for iteration in range(MAX_ITERATIONS):
        slope = basis.T @ (gradient - beta)
        # h is rounded to about 1e-16 |nu|, so the gradient cannot become smaller than that.
        if np.abs(slope).max(initial=0.0) <= RESIDUAL * scale + 1e-15 * float(np.abs(dual).max()):
            return dual, gradient, iteration
        curvature = basis.T @ hessian @ basis
        # Where few samples are free the curvature is (nearly) singular: a small ridge keeps the step defined,
        # and the cap keeps it within reach of the line search.
        ridge = 1e-12 * max(float(np.trace(curvature)), 1e-8) * np.eye(len(slope))
        direction = -(basis @ np.linalg.solve(curvature + ridge, slope))
        direction *= min(1.0, 10 * max(float(np.linalg.norm(dual)), 1.0) / float(np.linalg.norm(direction)))
        descent = float((gradient - beta) @ direction)
        # The slope along the direction rises steadily from `descent`. A full step that falls short of the
        # minimum is good; otherwise the slope must come down to half. Values of f would lose their precision.
        short, long, step = 0.0, np.inf, 1.0
        for _ in range(60):
            gradient, hessian = problem.evaluate(dual + step * direction)
            rise = float((gradient - beta) @ direction)
            if rise <= -0.5 * descent and (rise >= 0.5 * descent or long == np.inf):
                break
            short, long = (step, long) if rise < 0 else (short, step)
            step = 0.5 * (short + long)
        dual = dual + step * direction
    return dual, gradient, MAX_ITERATIONS


def largest_step(problem: Dual, direction: Floats) -> tuple[float, float]:
    """Largest a with 1/n Q h = a direction for some h within the bounds: (a reached, a that no h can exceed).

    Following max a - |h|^2 / (2 n t) for growing t: its dual is min f(nu) over nu . direction = t, which is
    always attained, and every h on the way is feasible. For any nu with nu . direction = t, support(nu) / t
    is above all a (linear programming duality), so the gap is known. The smallest t for which the gap is zero
    is finite.
    """
    square = float(direction @ direction)
    basis = np.linalg.svd(direction[None])[2][1:].T
    size = np.sqrt(square)
    dual, reached, limit = direction / square * size, 0.0, np.inf
    for _ in range(30):
        dual, gradient, _ = minimise(problem, np.zeros_like(dual), dual, basis)
        off = gradient - (gradient @ direction) / square * direction
        if np.abs(off).max() <= 1e-9 * max(np.abs(gradient).max(), 1e-300):
            reached = max(reached, float(gradient @ direction) / square)
        limit = min(limit, problem.support(dual) / float(dual @ direction))
        if limit - reached <= GAP * limit:
            return reached, limit
        dual = dual * 8.0
    raise PatterningError(
        f"largest feasible strength: only known to lie in [{reached:.6g}, {limit:.6g}]; widen the weight bounds"
    )


def row_covariance(shards: Sequence[np.ndarray]) -> tuple[Floats, Floats]:
    """Means and covariance (1/n) of the rows of chi over samples, in two passes."""
    num_samples = sum(shard.shape[1] for shard in shards)
    mean = np.sum([chunk.sum(axis=1) for chunk in chunks(shards)], axis=0) / num_samples
    covariance = np.zeros((len(mean), len(mean)))
    for chunk in chunks(shards):
        centered = chunk - mean[:, None]
        covariance += centered @ centered.T
    covariance /= num_samples
    # A constant row leaves rounding only, which must not pass for a response.
    constant = np.sqrt(np.diag(covariance)) <= 1e-12 * np.abs(mean)
    covariance[constant] = covariance[:, constant] = 0.0
    return mean, covariance
