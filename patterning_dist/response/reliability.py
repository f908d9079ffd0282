"""How repeatable a row of chi is, and intervals for correlations."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patterning_dist.errors import PatterningError

NUM_RANDOM_SPLITS = 50  # of more than 6 chains, where all splits would be hundreds
# Below this more than half of the variance of a row of chi is noise, also in the mean over both halves.
MOSTLY_SIGNAL = 1 / 3


class Correlation(NamedTuple):
    """A correlation and its interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


def split_half_reliability(chi_per_chain: ArrayLike) -> NDArray[np.float64]:
    """Correlation over the probe of chi rows from disjoint halves of the chains, mean over splits.
    [observable]

    chi_per_chain: [chain, observable, probe]. All splits of up to 6 chains, else 50 random ones (fixed seed);
    an odd number of chains splits into unequal parts. The value is that of *half* the chains: no
    Spearman-Brown correction, so the whole is more reliable. NaN with one chain, and for a row that is
    constant over the probe.

    Examples:
        >>> from patterning_dist import split_half_reliability
        >>> first = [[1, -1, 0, 0], [1, -1, 0, 0]]  # chi of a chain, observable sample
        >>> second = [[1, -1, 0, 0], [0, 0, 1, -1]]
        >>> split_half_reliability([first, second])  # of the second observable chi is noise
        array([1., 0.])
    """
    return reliability_from_sums(split_half_sums(chi_per_chain))


def split_half_sums(chi_per_chain: ArrayLike) -> NDArray[np.float64]:
    """What ``split_half_reliability`` needs of a part of the probe; sums of several parts add up.

    chi_per_chain: [chain, observable, probe]. Returns the sums over the probe of 1, a, b, aa, bb and ab, a and b being
    chi of the two halves [split, 6, observable]; no splits with one chain.
    """
    chi = np.asarray(chi_per_chain, np.float64)
    num_chains = len(chi)
    chains, size, halves = range(num_chains), num_chains // 2, []
    if 2 <= num_chains <= 6:
        halves = [half for half in combinations(chains, size) if 2 * size < num_chains or 0 in half]
    elif num_chains > 6:
        rng = np.random.default_rng(0)
        halves = [tuple(rng.permutation(num_chains)[:size]) for _ in range(NUM_RANDOM_SPLITS)]
    sums = np.zeros((len(halves), 6, chi.shape[1]))
    for split, half in enumerate(halves):
        rest = [chain for chain in chains if chain not in half]
        a, b = chi[list(half)].mean(axis=0), chi[rest].mean(axis=0)
        sums[split] = [part.sum(axis=-1) for part in (np.ones_like(a), a, b, a * a, b * b, a * b)]
    return sums


def reliability_from_sums(sums: ArrayLike) -> NDArray[np.float64]:
    """The mean over splits of the correlation, from ``split_half_sums`` of the whole probe. [observable]"""
    count, a, b, aa, bb, ab = np.moveaxis(np.asarray(sums, np.float64), 1, 0)
    if not len(count):
        return np.full(count.shape[1], np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Differences of squares: rows of chi sum to nearly zero over the probe, so little is lost.
        aa, bb, ab = aa - a * a / count, bb - b * b / count, ab - a * b / count
        constant = (aa <= 1e-13 * np.abs(a * a / count)) | (bb <= 1e-13 * np.abs(b * b / count))
        correlations = np.where(constant, np.nan, ab / np.sqrt(aa * bb))
    return correlations.mean(axis=0)


def bootstrap_correlation(
    a: ArrayLike,
    b: ArrayLike,
    groups: ArrayLike,
    seed: int,
    num_resamples: int = 1000,
) -> Correlation:
    """Pearson correlation with a 95 % percentile interval from resampling whole groups (block bootstrap, Efron 1979).

    a, b, groups: [sample]. Groups are sequence ids: tokens of one sequence are not independent, so an
    interval that counts each token is too narrow. NaN limits with fewer than 2 groups.

    Examples:
        >>> scores, documents = np.arange(6.0), [0, 0, 1, 1, 2, 2]
        >>> found = bootstrap_correlation(scores, -scores, documents, seed=0)
        >>> round(found.value, 6), round(found.high, 6)
        (-1.0, -1.0)
    """
    return _bootstrap(a, b, groups, seed, num_resamples, lambda aa, bb, ab: ab / np.sqrt(aa * bb))


def bootstrap_slope(a: ArrayLike, b: ArrayLike, groups: ArrayLike, seed: int, num_resamples: int = 1000) -> Correlation:
    """Slope of a on b through their means, Cov(a, b) / Var(b), with an interval as of ``bootstrap_correlation``.

    Where a is noisy and unbiased and b is not noisy, the slope is what b is to be multiplied with.

    Examples:
        >>> checked, documents = np.arange(6.0), [0, 0, 1, 1, 2, 2]
        >>> round(bootstrap_slope(2 * checked, checked, documents, seed=0).value, 6)  # of the first on the second
        2.0
    """
    return _bootstrap(a, b, groups, seed, num_resamples, lambda aa, bb, ab: ab / bb)


def _bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    groups: ArrayLike,
    seed: int,
    num_resamples: int,
    statistic: Callable[[Any, Any, Any], Any],
) -> Correlation:
    """statistic(Var a, Var b, Cov(a, b)) of the samples, and its quantiles over resampled groups."""
    first, second, group = np.asarray(a, np.float64), np.asarray(b, np.float64), np.asarray(groups)
    if first.ndim != 1 or first.shape != second.shape or len(first) < 2:
        raise PatterningError(
            f"correlation: got {first.shape} and {second.shape}, expected two vectors of one length >= 2"
        )
    if group.shape != first.shape:
        raise PatterningError(f"correlation: {group.shape} groups for {first.shape} samples, expected one for each")
    x, y = first - first.mean(), second - second.mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic((x * x).sum(), (y * y).sum(), (x * y).sum()))
    labels = np.unique(group, return_inverse=True)[1]
    num_groups = int(labels.max()) + 1
    if num_groups < 2 or not np.isfinite(value):
        return Correlation(value, np.nan, np.nan)
    # A resample is fixed by its group sums; centring first keeps the differences of squares exact.
    sums = np.stack([np.bincount(labels, part) for part in (np.ones_like(x), x, y, x * x, y * y, x * y)])
    rng = np.random.default_rng(seed)
    resampled = np.empty((num_resamples, len(sums)))
    for index in range(num_resamples):
        chosen = np.bincount(rng.integers(num_groups, size=num_groups), minlength=num_groups)
        resampled[index] = sums @ chosen
    count, mean_a, mean_b, aa, bb, ab = resampled.T
    mean_a, mean_b = mean_a / count, mean_b / count
    with np.errstate(invalid="ignore", divide="ignore"):
        values = statistic(aa / count - mean_a**2, bb / count - mean_b**2, ab / count - mean_a * mean_b)
    low, high = np.nanquantile(values, [0.025, 0.975])
    return Correlation(value, float(low), float(high))
