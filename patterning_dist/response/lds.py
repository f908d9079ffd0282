"""How well attribution scores predict retrainings: the field's LDS and QLD, with bootstrap intervals.

Scores are signed as losses: s_iq is by how much weight on training sample i raises the loss of query q, so that samples
that help the query have s_iq < 0. With l_jq the loss of query q after training without the samples of R_j,

    LDS = mean_q Spearman_j( sum_{i in R_j} s_iq , l_q - l_jq )        (Park et al., TRAK, 2303.14186)
    QLD = mean_q [ l_q(without the top share by -s_q) - l_q ]          (bergson 2.5, validate filter)

l_q being the loss after training on everything. Intervals are percentiles of bootstraps: of LDS over subsets and
queries at once (Owen, 2007, The pigeonhole bootstrap), for subsets are shared by all queries; of QLD over queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
_RESAMPLES = 4000
_ENDS = (0.025, 0.975)


@dataclass(frozen=True)
class Score:
    """A mean over queries.

    Attributes:
        value: the mean.
        interval: 95 %, over subsets and groups of queries, or over the latter alone where there are no subsets.
        over_subsets: 95 %, over subsets for these very queries, as bergson has it; of 40 subsets it covers 82 to 93 %.
            None: there are none.
        per_query: [query].
    """

    value: float
    interval: tuple[float, float]
    over_subsets: tuple[float, float] | None
    per_query: Floats


def removed_sums(scores: ArrayLike, removed: Sequence[NDArray[np.int64]]) -> Floats:
    """Sums of scores over the samples that each subset leaves out [subset, query].

    Args:
        scores: [query, sample].
        removed: ids that each subset leaves out.

    Examples:
        >>> removed_sums([[-1.0, 2.0, 0.5]], [np.array([0]), np.array([0, 1])])  # one query, two subsets
        array([[-1.],
               [ 1.]])
    """
    table = np.asarray(scores)
    return np.stack([table[:, ids].sum(axis=1, dtype=np.float64) for ids in removed])


def linear_datamodeling_score(predicted: ArrayLike, measured: ArrayLike, groups: ArrayLike) -> Score:
    """Mean over queries of Spearman's correlation over subsets, see the module.

    As bergson does, ranks are taken once, and those of a resample correlated. A query that is constant over the subsets
    on either side has correlation 0: nothing is predicted of it.

    Args:
        predicted: sums of scores [subset, query].
        measured: changes of losses, any constant a query left out [subset, query].
        groups: of queries that are resampled together, such as documents [query].

    Raises:
        ValueError: fewer than two subsets, or shapes that differ.

    Examples:
        >>> predicted, measured = [[1.0], [2.0], [3.0]], [[0.1], [0.3], [0.9]]  # three subsets, one query
        >>> round(linear_datamodeling_score(predicted, measured, groups=[0]).value, 6)  # ranks count, not sizes
        1.0
    """
    a, b = (scipy.stats.rankdata(np.asarray(values, np.float64), axis=0) for values in (predicted, measured))
    if a.shape != b.shape or len(a) < 2:
        raise ValueError(f"expected alike tables [subset, query] of two subsets or more, got {a.shape} and {b.shape}")
    rng = np.random.default_rng(0)
    of_subsets = rng.multinomial(len(a), np.full(len(a), 1 / len(a)), _RESAMPLES)
    resampled = _correlations(a, b, of_subsets)
    queries = _group_counts(rng, groups)
    per_query = _correlations(a, b, np.ones((1, len(a))))[0]
    return Score(
        float(per_query.mean()),
        _ends((resampled * queries).sum(axis=1) / queries.sum(axis=1)),
        _ends(resampled.mean(axis=1)),
        per_query,
    )


def mean_over_queries(changes: ArrayLike, groups: ArrayLike) -> Score:
    """QLD: mean of a change of every query's loss [query], with the interval over groups of queries."""
    per_query = np.asarray(changes, np.float64)
    queries = _group_counts(np.random.default_rng(0), groups)
    return Score(float(per_query.mean()), _ends(queries @ per_query / queries.sum(axis=1)), None, per_query)


def strongest(scores: ArrayLike, share: float) -> NDArray[np.int64]:
    """Numbers of the share of entries that help most, at least one, ascending.

    Args:
        scores: of one query [entry].
        share: of the entries [1].

    Examples:
        >>> strongest([0.5, -2.0, -1.0, 0.0], share=0.5)  # what helps has scores below 0
        array([1, 2])
    """
    row = np.asarray(scores)
    return np.sort(np.argsort(row, kind="stable")[: max(1, round(share * len(row)))])


def ceiling(agreement: float) -> float | None:
    """LDS that knowledge of the expected losses would have, from the agreement r of two halves of the seeds.

    The mean over all seeds has reliability 2 r / (1 + r) (Spearman-Brown), and correlates with its expectation by the
    root of that. None where the halves do not agree.

    Examples:
        >>> round(ceiling(0.5), 3)
        0.816
    """
    return (2 * agreement / (1 + agreement)) ** 0.5 if agreement > 0 else None


def _correlations(a: Floats, b: Floats, counts: NDArray[np.number]) -> Floats:
    """Pearson's correlation over subsets that come ``counts`` [resample, subset] times each [resample, query]."""
    counts = counts / counts.sum(axis=1, keepdims=True)
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    mean_a, mean_b = counts @ a, counts @ b
    covariance = counts @ (a * b) - mean_a * mean_b
    squares = (counts @ a**2 - mean_a**2) * (counts @ b**2 - mean_b**2)
    return np.divide(covariance, np.sqrt(squares.clip(0)), out=np.zeros_like(covariance), where=squares > 1e-12)


def _group_counts(rng: np.random.Generator, groups: ArrayLike) -> NDArray[np.int64]:
    """How often every query comes in resamples of their groups [resample, query]."""
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    number = int(group.max()) + 1
    return rng.multinomial(number, np.full(number, 1 / number), _RESAMPLES)[:, group]


def _ends(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, _ENDS)
    return float(low), float(high)
