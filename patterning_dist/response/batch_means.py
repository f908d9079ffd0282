"""Monte-Carlo errors of averages over a chain's draws, from contiguous batches of them.

Two batch lengths are used: the batches of ``CoMoments``, and pairs of neighbours. Batches shorter than a few
autocorrelation times give errors that are too small; the pairs see that, and the larger of the two errors is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import ArrayLike

from patterning_dist.response.moments import CoMoments, Floats, Moments


def paired(moments: CoMoments) -> list[list[int]]:
    """The non-empty batches in groups of two neighbours; one by one where that would leave a single group."""
    used = [int(index) for index in np.flatnonzero(moments.count)]
    size = 2 if len(used) > 2 else 1
    return [used[start : start + size] for start in range(0, len(used), size)]


class BatchMean(NamedTuple):
    """A mean over the draws of a chain, the variance of that mean, and how its batch means y_b spread."""

    mean: Floats
    variance: Floats
    squares: Floats  # sum_b (y_b - y)^2
    cubes: Floats  # sum_b (y_b - y)^3
    num_batches: int

    def negated(self) -> BatchMean:
        """That of the negated draws."""
        return self._replace(mean=-self.mean, cubes=-self.cubes)


def batch_mean(moments: CoMoments, statistic: Callable[[Moments], Floats]) -> BatchMean:
    """Mean over all draws and the variance of that mean, sum_b n_b (y_b - y)^2 / (n (B - 1)), Flegal & Jones (2010).

    Args:
        moments: of one chain.
        statistic: moments of a batch -> mean over its draws; any shape.

    Returns:
        The variance is the larger, entry by entry, of that by batches and that by pairs of batches; NaN with one batch.
    """
    groups = paired(moments)
    count = moments.num_recorded

    def group_mean(group: list[int]) -> tuple[int, Floats, list[Floats]]:
        values = [statistic(moments.batch(index)) for index in group]
        total = int(moments.count[group].sum())
        return total, sum(moments.count[i] / total * v for i, v in zip(group, values, strict=True)), values

    # Two passes over the batches, so that memory stays that of one pair.
    mean = np.asarray(sum(total / count * value for total, value, _ in map(group_mean, groups)))
    num_batches = sum(map(len, groups))
    by_batches, by_groups, squares, cubes = (np.zeros_like(mean) for _ in range(4))
    if num_batches < 2:
        return BatchMean(mean, np.full_like(mean, np.nan), squares, cubes, num_batches)
    for group in groups:
        total, value, values = group_mean(group)
        by_groups += total * (value - mean) ** 2
        for index, one in zip(group, values, strict=True):
            deviation = one - mean
            by_batches += moments.count[index] * deviation**2
            squares += deviation**2
            cubes += deviation**3
    variance = np.maximum(by_batches / (num_batches - 1), by_groups / (len(groups) - 1)) / count
    return BatchMean(mean, variance, squares, cubes, num_batches)


def product_mean(part: Moments, phi_center: Floats, loss_center: Floats) -> Floats:
    """Mean over the draws of `part` of (phi - phi_center)(l - loss_center). [observable probe]"""
    return part.comoment / part.count + np.outer(part.mean_phi - phi_center, part.mean_loss - loss_center)


def covariance_of_means(moments: CoMoments) -> Floats:
    """Cov(mean phi, mean l) of one chain, which its covariance about its own means is too small by.

    [observable probe]

    E[ mean (phi - mean phi)(l - mean l) ] = Cov(phi, l) - Cov(mean phi, mean l), and the second term is Cov(phi, l)
    times the autocorrelation time over the number of draws: 1/T for independent draws. Estimated from pairs of
    batches.
    """
    groups = paired(moments)
    total, count = moments.total(), np.array([moments.count[group].sum() for group in groups], np.float64)

    def deviations(batch_means: Floats, mean: Floats) -> Floats:
        return np.stack([moments.count[g] @ (batch_means[g] - mean) / moments.count[g].sum() for g in groups])

    phi, loss = deviations(moments.mean_phi, total.mean_phi), deviations(moments.mean_loss, total.mean_loss)
    if len(groups) < 2:  # one batch tells nothing of the autocorrelation
        return total.comoment / (total.count * (total.count - 1))
    return (count[:, None] * phi).T @ loss / (count.sum() * (len(groups) - 1))


def degrees_of_freedom(inside: ArrayLike, between: ArrayLike, num_inside: float, num_chains: int) -> Floats:
    """Degrees of freedom of the larger of two variances of one mean, Welch & Satterthwaite (1946).

    The larger is taken as inside + excess, excess = max(between - inside, 0), so nu = larger^2 / (inside^2 /
    nu_inside + excess^2 / (chains - 1)): few chains that agree do not widen an interval, and few that disagree do.

    Args:
        inside, between: variances of the mean, from inside chains and from the spread between them (NaN with one
            chain).
        num_inside: degrees of freedom of `inside`.
        num_chains: number of chains.
    """
    inside, between = np.asarray(inside, np.float64), np.asarray(between, np.float64)
    if num_chains < 2:
        return np.full_like(inside, num_inside)
    excess = np.maximum(between - inside, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        # In units of the larger, so that squares of small variances do not underflow.
        share = excess / (inside + excess)
        result = 1 / ((1 - share) ** 2 / num_inside + share**2 / (num_chains - 1))
    return np.where(np.isnan(inside), num_chains - 1.0, np.where(inside + excess > 0, result, num_inside))


def student_interval(value: ArrayLike, error: ArrayLike, degrees: ArrayLike, level: float) -> tuple[Floats, Floats]:
    """value -+ t_{(1 + level) / 2, degrees} * error: Student's interval.

    Examples:
        >>> low, high = student_interval(1.0, error=0.1, degrees=3, level=0.95)
        >>> round(float(low), 2), round(float(high), 2)  # 1 -+ 3.18 * 0.1
        (0.68, 1.32)
    """
    width = scipy.special.stdtrit(degrees, (1 + level) / 2) * np.asarray(error)
    return np.asarray(value) - width, np.asarray(value) + width


def skewed_interval(
    value: ArrayLike, error: ArrayLike, degrees: ArrayLike, skewness: ArrayLike, num_batches: int, level: float
) -> tuple[Floats, Floats]:
    """Student's interval, and on either side as far as one goes that knows of the skewness of the batch means.

    With T = (value - true) / error, a = skewness / sqrt(B), the transform g(T) = T + a T^2 / 3 + a^2 T^3 / 27 + a / 6
    is nearly free of skewness (Hall, 1992, "On the removal of skewness by transformation"), and has an inverse:
    value - error g^-1(+-t). A covariance of skewed draws, seen in few of them, is mostly too small, and its error with
    it: Student's interval alone misses the long side.

    Args:
        value, error, degrees: as in ``student_interval``.
        skewness: of the batch means.
        num_batches: of all chains, B.
        level: of the interval.
    """
    low, high = student_interval(value, error, degrees, level)
    a = np.asarray(skewness) / np.sqrt(num_batches)
    quantile = scipy.special.stdtrit(degrees, (1 + level) / 2)

    def inverse(x: Floats) -> Floats:
        small = np.abs(a) < 1e-6
        return np.where(small, x, 3 * (np.cbrt(1 + a * (x - a / 6)) - 1) / np.where(small, 1.0, a))

    ends = [np.asarray(value) - np.asarray(error) * inverse(sign * quantile) for sign in (1.0, -1.0)]
    return np.minimum(low, ends[0]), np.maximum(high, ends[1])
