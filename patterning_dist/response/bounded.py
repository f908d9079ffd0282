"""The dual of the bounded weight problem, solved by a semismooth Newton method.

    min 1/2 |h|^2 + 1/(2 tau) |R h - c|^2   or   s.t. R h = c;   with sum h = 0 and low <= h <= high

R = the centred rows of chi (or a projection of them), so that R h = chi h whenever sum h = 0. With Q the rows
of R turned and scaled to Q Q^T / n = I and a last row of ones, the dual function of nu (one entry a row of Q)

    f(nu) = 1/n sum_i psi(q_i . nu) + 1/2 nu^T P nu - beta . nu,   psi(y) = max_{low <= h <= high} h y - h^2/2

is convex, once differentiable and piecewise quadratic, and its minimiser gives h_i = clip(q_i . nu, low,
high). P = 0 for equalities. One evaluation is one pass over the columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from patterning_dist.errors import PatterningError
from patterning_dist.response.columns import Columns
from patterning_dist.response.moments import Floats

RESIDUAL = 1e-11  # of the largest entry of beta; Newton on a piecewise linear equation ends at rounding
MAX_ITERATIONS = 200
GAP = 1e-7  # relative, of the largest feasible strength
_SMOOTH = 4  # free columns, a direction, with which f still looks quadratic a Newton step away


class Pass(NamedTuple):
    """Sums over all columns at a dual point, of f without its linear term beta . nu.

    Attributes:
        gradient: of f [dual].
        curvature: generalised Hessian of f [dual, dual].
        square: mean of h^2.
        pull: half the gradient of ``square`` [dual].
        support: 1/n sum_i max(low y_i, high y_i): no h within the bounds has 1/n h.(Q^T nu) above this.
        num_free: columns whose h is at no bound.
    """

    gradient: Floats
    curvature: Floats
    square: float
    pull: Floats
    support: float
    num_free: int


class Dual(Protocol):
    """What is asked of a problem here: `Problem`, or `GroupedProblem` of ``response.grouped``."""

    @property
    def columns(self) -> Columns: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    def evaluate(self, dual: Floats) -> Pass: ...
    def interventions(self, dual: Floats, found: Pass) -> Iterator[tuple[Floats, Floats]]: ...


@dataclass(frozen=True)
class Problem:
    """Columns of chi, and q = turn @ (chi - row_mean), one row of ones last."""

    columns: Columns
    row_mean: Floats  # observable
    turn: Floats  # direction observable
    penalty: Floats  # dual dual, P above
    low: float
    high: float

    def scores(self, piece: Floats, dual: Floats) -> Floats:
        """q_i . nu of the columns of a piece. [sample]"""
        slope = dual[:-1] @ self.turn
        return slope @ piece + (dual[-1] - slope @ self.row_mean)

    def evaluate(self, dual: Floats) -> Pass:
        num_rows = len(self.row_mean) + 1
        response, pull = np.zeros(num_rows), np.zeros(num_rows)
        curvature, square, support, num_free = np.zeros((num_rows, num_rows)), 0.0, 0.0, 0
        for piece in self.columns:
            score = self.scores(piece, dual)
            h = np.clip(score, self.low, self.high)
            is_free = h == score
            rows = np.empty((num_rows, len(h)))
            np.subtract(piece, self.row_mean[:, None], out=rows[:-1])
            rows[-1] = 1.0
            response += rows @ h
            square += float(h @ h)
            support += float(np.maximum(self.low * score, self.high * score).sum())
            num_free += int(np.count_nonzero(is_free))
            if not is_free.all():
                rows *= is_free
            pull += rows @ h
            curvature += rows @ rows.T
        turn = np.eye(len(dual), num_rows)
        turn[:-1, :-1], turn[:-1, -1], turn[-1, :-1], turn[-1, -1] = self.turn, 0.0, 0.0, 1.0
        number = self.columns.num_samples
        return Pass(
            turn @ response / number + self.penalty @ dual,
            turn @ curvature @ turn.T / number + self.penalty,
            square / number,
            turn @ pull / number,
            support / number,
            num_free,
        )

    def interventions(self, dual: Floats, found: Pass) -> Iterator[tuple[Floats, Floats]]:
        """Pieces of chi and of h [sample], the last rounding of whose sum is spread over its free entries."""
        number = self.columns.num_samples
        shift = number * (found.gradient - self.penalty @ dual)[-1] / max(found.num_free, 1)
        for piece in self.columns:
            h = np.clip(self.scores(piece, dual), self.low, self.high)
            free = (h > self.low) & (h < self.high)
            yield piece, np.where(free, np.clip(h - shift, self.low, self.high), h)


def minimise(problem: Dual, beta: Floats, start: Floats, basis: Floats) -> tuple[Floats, Pass, int]:
    """Minimise f(nu) - beta . nu over start + span(basis columns).

    Returns nu, the sums there and the number of iterations; the caller judges the gradient.
    """
    dual = start
    found = problem.evaluate(dual)
    scale = max(float(np.abs(found.gradient - beta).max()), float(np.abs(beta).max()), 1e-300)
    for iteration in range(MAX_ITERATIONS):
        slope = basis.T @ (found.gradient - beta)
        # h is rounded to about 1e-16 |nu|, so the gradient cannot become smaller than that.
        if np.abs(slope).max(initial=0.0) <= RESIDUAL * scale + 1e-15 * float(np.abs(dual).max()):
            return dual, found, iteration
        direction = -(basis @ np.linalg.solve(steadied(basis.T @ found.curvature @ basis), slope))
        direction *= min(1.0, 10 * max(float(np.linalg.norm(dual)), 1.0) / float(np.linalg.norm(direction)))
        descent = float((found.gradient - beta) @ direction)
        # The slope along the direction rises steadily from `descent`. A full step that falls short of the
        # minimum is good; otherwise the slope must come down to half. Values of f would lose their precision.
        short, long, step = 0.0, np.inf, 1.0
        for _ in range(60):
            found = problem.evaluate(dual + step * direction)
            rise = float((found.gradient - beta) @ direction)
            if rise <= -0.5 * descent and (rise >= 0.5 * descent or long == np.inf):
                break
            short, long = (step, long) if rise < 0 else (short, step)
            step = 0.5 * (short + long)
        dual = dual + step * direction
    return dual, found, MAX_ITERATIONS


def steadied(curvature: Floats) -> Floats:
    """The curvature with a small ridge: where few samples are free it is (nearly) singular, and a step stays defined.

    The cap on a step keeps it within reach of the line search.
    """
    return curvature + 1e-12 * max(float(np.trace(curvature)), 1e-8) * np.eye(len(curvature))


class Largest(NamedTuple):
    """The largest feasible strength: (reached by an h, what no h can exceed), where, and the mean of h^2 there.

    ``smooth`` is the last dual point on the way with many free columns: a start for a problem like this one.
    """

    reached: float
    limit: float
    square: float
    smooth: Floats


def largest_step(problem: Dual, direction: Floats, start: Floats | None = None) -> Largest:
    """Largest a with 1/n Q h = a direction for some h within the bounds.

    Following max a - |h|^2 / (2 n t) for growing t: its dual is min f(nu) over nu . direction = t, which is
    always attained, and every h on the way is feasible. For any nu with nu . direction = t, support(nu) / t
    is above all a (linear programming duality), so the gap is known. The smallest t for which the gap is zero
    is finite. ``start``: nu that nearly minimises f for its own t, from which the way then begins. Raises
    PatterningError where the gap does not close.
    """
    length = float(np.linalg.norm(direction))
    basis = np.linalg.svd(direction[None])[2][1:].T
    dual, reached, limit, square = direction / length if start is None else start, 0.0, np.inf, 0.0
    smooth = dual
    for _ in range(30):
        dual, found, _ = minimise(problem, np.zeros_like(dual), dual, basis)
        along = float(found.gradient @ direction) / length**2
        off = found.gradient - along * direction
        if np.abs(off).max() <= 1e-9 * max(np.abs(found.gradient).max(), 1e-300) and along > reached:
            reached, square = along, found.square
        limit = min(limit, found.support / float(dual @ direction))
        if found.num_free >= _SMOOTH * len(dual):
            smooth = dual
        if limit - reached <= GAP * limit:
            return Largest(reached, limit, square, smooth)
        dual = dual * 8.0
    raise PatterningError(
        f"largest feasible strength: only known to lie in [{reached:.6g}, {limit:.6g}]; widen the weight bounds"
    )
