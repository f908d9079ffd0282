"""From responses at solutions of two kinds to the direction that makes one of them more likely.

A solution is a network at which chains were run. Its row is the response of its free energy to the weight of every
sample, chi_i = <l_i - L> in nats (``llc.free_energy_response``). Between solutions U and V of equal loss the log odds
of the posterior move by -(dF_U - dF_V) = -(n_beta / n) sum_i (chi^U_i - chi^V_i) h_i. There is no network and no Ray
here.
"""

from __future__ import annotations

import numpy as np

from patterning_dist.errors import PatterningError
from patterning_dist.response.moments import Floats

_OFFSET = 1e-4  # nats; smaller differences are sampling noise
_HALVINGS = 100  # of all there are, which are too many from a dozen solutions on


def mean_rows(responses: Floats, kinds: np.ndarray) -> Floats:
    """Rows of kind 1 and of kind 0, means over solutions [kind, sample].

    Args:
        responses: [solution, sample].
        kinds: 1 or 0 [solution].

    Raises:
        PatterningError: fewer than two solutions of a kind.
    """
    rows = [responses[kinds == kind] for kind in (1, 0)]
    if min(map(len, rows)) < 2:
        raise PatterningError(
            f"responses: {len(rows[0])} and {len(rows[1])} solutions of the two kinds, expected at least two of each"
        )
    return np.stack([row.mean(axis=0) for row in rows])


def toward_first(losses: Floats, kinds: np.ndarray, classes: np.ndarray, share: float) -> Floats:
    """Score of the samples that make solutions of kind 1 more likely: mean ``log_excess`` of kind 0 - that of kind 1.

    The log odds themselves move by <l_i> of kind 0 - <l_i> of kind 1 in nats. Taken as it is, this is led by a few
    samples that are hard for both kinds, by the solutions with the largest losses, and by how sure of itself a solution
    is: those are not what tells the kinds apart.

    Cut off at the quantiles `share` and 1 - `share` of its class, then with mean 0 and standard deviation 1 in every
    class, so that weights along it keep the mass of the classes [sample].

    Args:
        losses: expected losses <l_i> of the chains, or losses at the solutions; not negative, nats [solution, sample].
        kinds: 1 or 0 [solution].
        classes: labels [sample].
        share: see above.

    Raises:
        PatterningError: as in ``mean_rows``.
    """
    ones, zeros = mean_rows(log_excess(losses, classes), kinds)
    return standardised(winsorised(zeros - ones, classes, share), classes)


def log_excess(losses: Floats, classes: np.ndarray) -> Floats:
    """log of the losses above the least of the solution and class, plus a ten-thousandth of a nat [solution, sample].

    The least loss is that of saturated logits, the same for many samples: it says how sure a solution is, not of what.
    """
    excess = np.array(losses, np.float64)
    for label in np.unique(classes):
        here = classes == label
        excess[:, here] -= excess[:, here].min(axis=1, keepdims=True)
    return np.log(excess + _OFFSET)


def winsorised(scores: Floats, classes: np.ndarray, share: float) -> Floats:
    """Scores cut off at the quantiles `share` and 1 - `share` of their class [sample]."""
    result = np.array(scores, np.float64)
    for label in np.unique(classes):
        here = classes == label
        result[here] = np.clip(result[here], *np.quantile(result[here], [share, 1 - share]))
    return result


def standardised(scores: Floats, classes: np.ndarray) -> Floats:
    """Scores with mean 0 and standard deviation 1 within every class; 0 in a class without spread [sample]."""
    result = np.array(scores, np.float64)
    for label in np.unique(classes):
        here = classes == label
        result[here] -= result[here].mean()
        spread = result[here].std()
        result[here] /= spread if spread > 0 else 1.0
    return result


def shuffled_kinds(rng: np.random.Generator, kinds: np.ndarray) -> np.ndarray:
    """Kinds dealt out again, half of each kind wrong: a direction from them knows as little of the rules as can be."""
    flipped = kinds.copy()
    for kind in (0, 1):
        of_kind = np.flatnonzero(kinds == kind)
        flipped[rng.permutation(of_kind)[: len(of_kind) // 2]] = 1 - kind
    return flipped


def reliability(halves: tuple[Floats, Floats], classes: np.ndarray) -> float:
    """Correlation of two estimates of a direction over samples, each standardised within classes [1]."""
    first, second = (standardised(half, classes) for half in halves)
    return float(np.corrcoef(first, second)[0, 1])


def reliability_between_solutions(responses: Floats, kinds: np.ndarray, classes: np.ndarray) -> float:
    """Mean ``reliability`` of directions from disjoint halves of the solutions of either kind, over random halvings."""
    rng, found = np.random.default_rng(0), []
    for _ in range(_HALVINGS):
        ones, zeros = (np.array_split(rng.permutation(np.flatnonzero(kinds == kind)), 2) for kind in (1, 0))
        first, second = (
            responses[some].mean(axis=0) - responses[others].mean(axis=0)
            for some, others in zip(ones, zeros, strict=True)
        )
        found.append(reliability((first, second), classes))
    return float(np.mean(found))
