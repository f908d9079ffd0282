"""The dual of the bounded weight problem in which every group of samples keeps its mass.

    min 1/2 |h|^2 + 1/(2 tau) |R h - c|^2   or   s.t. R h = c;   with sum_{i in g} h_i = 0 for every g, low <= h <= high

R = the rows of chi less their means over each group, so that R h = chi h. Every group has a multiplier lambda_g of its
own in the dual function of `response.bounded`,

    f(nu, lambda) = 1/n sum_i psi(q_i . nu + lambda_g(i)) + 1/2 nu^T P nu - beta . nu

and for a given nu they do not see each other: lambda_g is the root of sum_{i in g} clip(q_i . nu + lambda_g, low,
high), which rises in lambda_g. What is left is F(nu) = min_lambda f, convex and piecewise quadratic in as many
variables as there are directions, whose gradient is Q h / n and whose Hessian is that of the free entries about their
means over each group (the Schur complement). Groups may be as many as samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from patterning_dist.errors import PatterningError
from patterning_dist.response.bounded import Pass
from patterning_dist.response.columns import Columns, check_finite
from patterning_dist.response.moments import Floats

EPSILON = float(np.finfo(np.float64).eps)
MAX_PASSES = 500  # ten times what bisection takes to rounding


@dataclass(frozen=True)
class GroupedProblem:
    """Columns of chi, and q = turn @ (chi - its mean over the group)."""

    columns: Columns
    labels: np.ndarray  # sample: number of its group
    group_means: Floats  # observable group
    turn: Floats  # direction observable
    penalty: Floats  # direction direction, P above
    low: float
    high: float
    last: Floats  # group: multipliers that were found last, over |nu|; the next search begins there

    @property
    def num_groups(self) -> int:
        return self.group_means.shape[1]

    def balanced(self, dual: Floats) -> Floats:
        """y_i = q_i . nu + lambda_g(i), whose h = clip(y, low, high) sums to 0 in every group. [sample]"""
        slope = dual @ self.turn
        offsets = slope @ self.group_means
        score = np.concatenate([slope @ piece for piece in self.columns]) - offsets[self.labels]
        length = float(np.linalg.norm(dual))
        found = multipliers(score, self.labels, length * self.last, self.low, self.high)
        self.last[:] = found / max(length, 1e-300)
        return score + found[self.labels]

    def evaluate(self, dual: Floats) -> Pass:
        """Of F at nu; h and the free columns are those of the multipliers that belong to it.

        The support holds for any multipliers. These put the free entry of a group at y = 0, where it adds nothing: most
        groups have one where the strength is largest, and the bound is then attained at duals of moderate size.
        """
        balanced, num_rows = self.balanced(dual), len(self.turn)
        response, pull, curvature = np.zeros(num_rows), np.zeros(num_rows), np.zeros((num_rows, num_rows))
        sums, count, square = np.zeros((num_rows, self.num_groups)), np.zeros(self.num_groups), 0.0
        for columns, labels, score in pieces(self.columns, self.labels, balanced):
            rows = self.turn @ (columns - self.group_means[:, labels])
            h = np.clip(score, self.low, self.high)
            response += rows @ h
            square += float(h @ h)
            free, of_free = rows[:, h == score], labels[h == score]
            count += np.bincount(of_free, minlength=self.num_groups)
            for k, row in enumerate(free):
                sums[k] += np.bincount(of_free, row, self.num_groups)
        # About the means, not less their squares: groups with one free entry, which are many near the largest strength,
        # must add nothing at all.
        sums /= np.maximum(count, 1)
        for columns, labels, score in pieces(self.columns, self.labels, balanced):
            is_free = np.clip(score, self.low, self.high) == score
            of_free = labels[is_free]
            rows = self.turn @ (columns[:, is_free] - self.group_means[:, of_free])
            rows -= sums[:, of_free]
            pull += rows @ score[is_free]
            curvature += rows @ rows.T
        number = len(balanced)
        return Pass(
            response / number + self.penalty @ dual,
            curvature / number + self.penalty,
            square / number,
            pull / number,
            self._support(balanced),
            int(count.sum()),
        )

    def _support(self, balanced: Floats) -> float:
        free = (balanced > self.low) & (balanced < self.high)
        sums, count = (np.bincount(self.labels[free], x, self.num_groups) for x in (balanced[free], free[free]))
        score = balanced - (sums / np.maximum(count, 1))[self.labels]
        return float(np.maximum(self.low * score, self.high * score).mean())

    def interventions(self, dual: Floats, found: Pass) -> Iterator[tuple[Floats, Floats]]:
        """Pieces of chi and of h [sample]; the last rounding of the sums is spread over the free entries of a group."""
        h = np.clip(self.balanced(dual), self.low, self.high)
        free = (h > self.low) & (h < self.high)
        excess, count = (np.bincount(self.labels, values, self.num_groups) for values in (h, free))
        shift = excess / np.maximum(count, 1)
        yield from pieces(self.columns, np.where(free, np.clip(h - shift[self.labels], self.low, self.high), h))


def pose_groups(columns: Columns, groups: ArrayLike) -> tuple[np.ndarray, Floats, Floats]:
    """Numbers from 0 of the groups [sample], means of chi over each [observable, group], and its covariance about them.

    Raises PatterningError for labels that are not whole numbers, one a sample, and for a chi that does not vary within
    groups.
    """
    labels, num_samples = np.asarray(groups), columns.num_samples
    if labels.shape != (num_samples,) or labels.dtype.kind not in "iu":
        raise PatterningError(
            f"groups: got {labels.dtype} of shape {list(labels.shape)}, expected {num_samples} whole numbers, "
            "one a sample"
        )
    labels = np.unique(labels, return_inverse=True)[1]
    size, num_rows = np.bincount(labels), columns.num_rows
    means, covariance = np.zeros((num_rows, len(size))), np.zeros((num_rows, num_rows))
    for piece, of_piece in pieces(columns, labels):
        for k, row in enumerate(piece):
            means[k] += np.bincount(of_piece, row, len(size))
    check_finite(means)
    means /= size
    for piece, of_piece in pieces(columns, labels):
        centered = piece - means[:, of_piece]
        covariance += centered @ centered.T / num_samples
    # A row that is constant over groups leaves rounding only, which must not pass for a response.
    constant = np.sqrt(np.diag(covariance)) <= 1e-12 * np.abs(means).max(axis=1)
    if constant.all():
        raise PatterningError(
            "groups: chi does not vary within any of them, so no weights that keep their masses change the response; "
            "give coarser groups or none"
        )
    covariance[constant] = covariance[:, constant] = 0.0
    return labels, means, covariance


def pieces(columns: Columns, *values: np.ndarray) -> Iterator[tuple[Any, ...]]:
    """Pieces of the columns, and of what there is of every sample."""
    start = 0
    for piece in columns:
        here = slice(start, start := start + piece.shape[1])
        yield piece, *(array[here] for array in values)


def multipliers(score: Floats, labels: np.ndarray, start: Floats, low: float, high: float) -> Floats:
    """lambda_g with sum_{i in g} clip(score_i + lambda_g, low, high) = 0, searched from `start` on. [group]

    Newton's method on all groups at once. Where a step has no free entry to go by, leaves its bracket, or follows one
    that did not halve the sum, it halves the bracket; before there is one, steps away from the start double.
    """
    found, active = start.copy(), np.arange(len(start))
    down, up = np.full(len(start), -np.inf), np.full(len(start), np.inf)
    reach, before = np.ones(len(start)), np.full(len(start), np.inf)
    size = np.bincount(labels, minlength=len(start))
    for _ in range(MAX_PASSES):
        at = found[active]
        value = score + at[labels]
        h = np.clip(value, low, high)
        total = np.bincount(labels, h, len(active))
        rounding = 4 * EPSILON * max(float(h.max(initial=0.0)), -float(h.min(initial=0.0)))
        going = np.abs(total) > rounding * size
        if not going.any():
            return found
        free = np.bincount(labels[h == value], minlength=len(active))
        down, up = np.where(total <= 0, at, down), np.where(total >= 0, at, up)
        newton = at - total / np.maximum(free, 1)
        bracketed = np.isfinite(down) & np.isfinite(up)
        middle = np.where(bracketed, 0.5 * (down + up), at - np.sign(total) * reach)
        good = (free > 0) & (newton > down) & (newton < up) & (np.abs(total) <= 0.5 * before)
        reached = rounding + 4 * EPSILON * np.abs(at)  # as near as a free value comes
        going &= (up - down > reached) & ((free == 0) | (np.abs(newton - at) > reached))
        found[active] = np.where(going, np.where(good, newton, middle), at)
        reach, before = np.where(good | bracketed, reach, 2 * reach), np.abs(total)
        if not going.all():
            kept, renumbered = going[labels], np.cumsum(going) - 1
            score, labels = score[kept], renumbered[labels[kept]]
            active, size = active[going], size[going]
            down, up, reach, before = down[going], up[going], reach[going], before[going]
    raise AssertionError("brackets halve until they are empty")
