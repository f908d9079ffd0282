"""Responses measured by coupled chains: the same noise and minibatches, on L and on L_rho at several strengths.

rho = 1 + s h with h of mean 0, so L_rho = L + s D, D = (1/n) sum_i h_i l_i. Traces [chain, draw] are deviations from
w*. The difference of two coupled traces, draw by draw, has a small part of the Monte-Carlo noise of either:

    d<phi>(s)   = mean_t [ phi(w_t^s) - phi(w_t^0) ]
    d lambda(s) = n_beta mean_t [ (L_rho(w_t^s) - L_rho(w*)) - (L(w_t^0) - L(w*)) ]
    dF/ds       = n_beta <D>_s ,    F(s) - F(0) = n_beta integral_0^s <D>_u du           (thermodynamic integration)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from patterning_dist.response.llc import TraceMean, trace_mean
from patterning_dist.response.moments import Floats

# From so many chains their spread alone makes an interval: Student's t is 3.2 there, and 4.3 or 12.7 with fewer.
_ENOUGH_CHAINS = 4


class Linear(NamedTuple):
    """What linear response says of a slope: (n_beta / n) chi h, with the half width of its 95 % interval.

    ``per_chain`` [chain] where it is of the chains whose coupled ones are measured; None: of others.
    """

    value: float
    standard_error: float
    width: float
    per_chain: Floats | None = None


def coupled_mean(differences: Floats) -> TraceMean:
    """Mean of differences of coupled traces [chain, draw], with its standard error.

    Such differences swing back: their autocorrelation is negative over many draws, and an error from inside a chain is
    2 to 3.6 times too large on chains of 60 to 240 draws, by effective sample sizes (which stop at the first negative
    autocovariance, Geyer 1992) and by batch means (all edges) alike. So with 4 chains or more it is the spread between
    chains / sqrt(chains), with Student's t of chains - 1 degrees, whatever goes on inside them; with fewer the larger
    of both, which errs on the wide side.

    Raises:
        PatterningError: fewer than 4 draws a chain, or values that are not finite.
    """
    inside_or_between = trace_mean(differences)
    means = np.asarray(differences, np.float64).mean(axis=1)
    return inside_or_between if len(means) < _ENOUGH_CHAINS else _over_chains(means)


def smallest_pair(strengths: Sequence[float]) -> float | None:
    """The smallest s > 0 whose negative is there as well; None: there is no such pair.

    Examples:
        >>> smallest_pair([-0.5, 0.25, 0.5, 1.0])  # 0.25 has no negative
        0.5
    """
    return min((s for s in strengths if s > 0 and -s in strengths), default=None)


def symmetric_slope(above: Floats, below: Floats, strength: float) -> Floats:
    """[phi(w_t^s) - phi(w_t^-s)] / 2s: the slope at 0 without its second order, off by s^2 / 6 of the third.

    Args:
        above, below: traces at s and at -s; of phi itself, of L_rho times n_beta (the LLC), or F by ``integrated``.
        strength: s.

    Examples:
        >>> above, below = np.array([0.11]), np.array([-0.09])  # phi = s + s^2 at s = +-0.1
        >>> symmetric_slope(above, below, 0.1).round(6)
        array([1.])
    """
    return (above - below) / (2 * strength)


def free_energy_slope(
    weighted: Floats, plain: Floats, strength: float, inverse_temperature: float, at_center: float, mean_weight: float
) -> Floats:
    """dF/ds at s, draw by draw: n_beta D(w_t^s), from one chain alone; no chain at 0 is needed, nor is one compared.

    Args:
        weighted: L_rho(w) - L_rho(w*) of the chain, on the probe [chain, draw], nats.
        plain: L(w) - L(w*) of the same draws.
        strength: s, not 0.
        inverse_temperature: n_beta.
        at_center: D(w*), nats.
        mean_weight: mean of rho over the probe, where L_rho = sum rho_i l_i / sum rho_i; 1 if it is the whole pool.
    """
    return inverse_temperature * ((weighted - plain) * (mean_weight / strength) + at_center)


def integrated(slopes: Mapping[float, Floats], strength: float) -> Floats:
    """F(s) - F(0), draw by draw: the polynomial through the slopes at all strengths, integrated from 0 to s.

    With slopes at k strengths of up to s in size it is off by O(s^(k+1)); none of them is at 0, so that nothing of what
    linear response predicts is in it.

    Args:
        slopes: strength -> dF/ds of ``free_energy_slope``.
        strength: s.

    Examples:
        >>> slopes = {-1.0: np.array([-2.0]), 1.0: np.array([2.0])}  # dF/ds = 2 s
        >>> integrated(slopes, 1.0).round(6)  # F = s^2
        array([1.])
    """
    at, powers = np.array(list(slopes)), np.arange(len(slopes))
    # c with sum_j c_j p(s_j) = integral_0^s p for every polynomial p of the degree.
    wanted = strength ** (powers + 1) / (powers + 1)
    shares = np.linalg.solve(at[None] ** powers[:, None], wanted)
    return np.tensordot(shares, np.stack(list(slopes.values())), axes=1)


def measured(found: TraceMean) -> dict[str, Any]:
    """Value, standard error and 95 % interval of a mean."""
    return {
        "value": found.value,
        "standard_error": found.standard_error,
        "interval": [float(bound) for bound in found.interval()],
    }


def verdict(found: TraceMean, linear: Linear, per_chain: Floats, exact: float = 0.0) -> dict[str, Any]:
    """A measured slope against a predicted one: z-score of the difference, ratio, and what they come to.

    ``agrees`` where 0 is in the 95 % interval of the difference, ``disagrees`` where it is not, and ``not resolved``
    where neither number is distinguishable from 0. Where the prediction is of the same chains the noise that it shares
    with the measurement is in neither: the error is the spread of the differences. Otherwise errors, and half widths of
    intervals, add up as squares.

    Args:
        found: measured.
        linear: predicted.
        per_chain: what ``found`` is of each chain [chain].
        exact: a part of both that no chain has estimated, n_beta D(w*) of a free energy: the ratio, and whether there
            is anything to tell from 0, are of what is beyond it.
    """
    values, widths = np.array([found.value, linear.value]) - exact, np.nan_to_num([_half_width(found), linear.width])
    error, width = np.hypot(found.standard_error, np.nan_to_num(linear.standard_error)), np.hypot(*widths)
    if linear.per_chain is not None and len(per_chain) == len(linear.per_chain) >= _ENOUGH_CHAINS:
        paired = _over_chains(per_chain - linear.per_chain)
        error, width = paired.standard_error, _half_width(paired)
    difference = found.value - linear.value
    is_noise = bool((np.abs(values) < widths).all())
    return {
        "predicted": linear.value,
        "predicted_standard_error": linear.standard_error,
        "predicted_interval": [linear.value - linear.width, linear.value + linear.width],
        "z": float(difference / error) if error else None,
        "ratio": float(values[0] / values[1]) if values[1] else None,
        "verdict": "not resolved" if is_noise else "agrees" if abs(difference) <= width else "disagrees",
    }


def _over_chains(means: Floats) -> TraceMean:
    return TraceMean(float(means.mean()), float(means.std(ddof=1) / np.sqrt(len(means))), len(means) - 1.0)


def _half_width(found: TraceMean) -> float:
    low, high = found.interval()
    return (high - low) / 2
