"""Can this estimate be trusted: convergence of observables and probe entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patterning_dist.errors import PatterningError
from patterning_dist.response.arviz import array_stats
from patterning_dist.response.moments import CoMoments


def observable_diagnostics(traces: Mapping[str, ArrayLike]) -> dict[str, dict[str, float]]:
    """Rank-normalised split R-hat, bulk ESS, the Monte-Carlo error of the mean (Vehtari et al. 2021), autocorrelation.

    traces: observable -> [chain, draw]. `autocorrelation` is that of neighbouring draws, about each chain's own mean;
    `autocorrelation_time` [draws] is all draws over the effective ones of the mean, 1 + 2 sum of autocorrelations,
    which counts disagreement between chains too. R-hat is NaN with one chain; R-hat, ESS and autocorrelations are NaN
    for a constant trace. Raises PatterningError for a trace with fewer than 4 draws or an entry that is not finite.

    Examples:
        >>> phi = np.random.default_rng(0).normal(size=(4, 500))
        >>> mixed = observable_diagnostics({"phi": phi})["phi"]
        >>> apart = observable_diagnostics({"phi": phi + [[0], [0], [0], [3]]})["phi"]  # a chain that sits elsewhere
        >>> round(mixed["rhat"], 2), apart["rhat"] > 1.1
        (1.0, True)
        >>> mixed["ess_bulk"] > 1500, apart["ess_bulk"] < 20  # effective draws, of 2000
        (True, True)
    """
    result = {}
    for name, values in traces.items():
        trace = checked_trace(name, values)
        varies = np.ptp(trace) > 0
        result[name] = {
            "mean": float(trace.mean()),
            "standard_deviation": float(trace.std(ddof=1)),
            "rhat": rank_rhat(trace) if varies and len(trace) > 1 else np.nan,
            "ess_bulk": float(array_stats().ess(trace, method="bulk")) if varies else np.nan,
            "mcse": float(array_stats().mcse(trace, method="mean")) if varies else 0.0,
            "autocorrelation": _lag_one(trace) if varies else np.nan,
            "autocorrelation_time": trace.size / float(array_stats().ess(trace, method="mean")) if varies else np.nan,
        }
    return result


def rank_rhat(trace: NDArray[np.float64]) -> float:
    """Rank-normalised split R-hat, Vehtari et al. (2021), of [chain, draw] with 2 chains or more.

    Infinite for chains that stand still at different places.

    Examples:
        >>> rank_rhat(np.array([[0.0] * 8, [1.0] * 8]))
        inf
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(array_stats().rhat(trace, method="rank"))


def _lag_one(trace: NDArray[np.float64]) -> float:
    # Of the chains' summed autocovariances, so that a chain that stands still counts for nothing.
    autocovariance = array_stats().autocov(trace, axis=1).sum(axis=0)
    return float(autocovariance[1] / autocovariance[0]) if autocovariance[0] > 0 else np.nan


def split_rhat(chains: Sequence[CoMoments], of: Literal["loss", "phi"] = "loss") -> NDArray[np.float64]:
    """Classic split R-hat of each probe loss, sqrt((B / W + n - 1) / n), Gelman et al. (2013), from half
    chains. [probe]

    n draws in a half chain, B = n Var(means of the halves), W = mean variance inside the halves. Not
    rank-normalised: ranks would need the draws. NaN for a loss that does not vary. Odd chains: n is the mean
    length. With `of="phi"` that of each observable. [observable]

    Examples:
        >>> from patterning_dist import CoMoments, split_rhat
        >>> chains = [CoMoments.empty(c, num_draws=8, num_observables=1, num_probes=2, num_batches=2) for c in (0, 1)]
        >>> for chain in chains:
        ...     wiggle = np.tile([[-0.1], [0.1]], (4, 1))
        ...     chain.update(wiggle, wiggle + [chain.chain, 0.0])  # the first loss is 1 higher in chain 1
        >>> split_rhat(chains).round(1)  # of the first loss the chains are at different places
        array([5.1, 0.9])
    """
    halves = [half for moments in chains for half in moments.halves()]
    if min(half.count for half in halves) < 2:
        raise PatterningError("split R-hat: a half chain has fewer than 2 draws, expected at least 4 draws a chain")
    count = np.mean([half.count for half in halves])
    within = np.mean([getattr(half, f"m2_{of}") / (half.count - 1) for half in halves], axis=0)
    between = count * np.var([getattr(half, f"mean_{of}") for half in halves], axis=0, ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt((between / within + count - 1) / count)


def checked_trace(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """`values` as [chain, draw] float64; PatterningError naming what is wrong with them."""
    trace = np.asarray(values, np.float64)
    if trace.ndim != 2 or trace.shape[1] < 4:
        raise PatterningError(f"{name}: trace of shape {trace.shape}, expected [chain, draw] with at least 4 draws")
    if not np.isfinite(trace).all():
        chain, draw = np.argwhere(~np.isfinite(trace))[0]
        raise PatterningError(f"{name}: row {chain}, draw {draw} is {trace[chain, draw]}; leave that chain out")
    return trace
