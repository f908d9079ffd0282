"""Comparisons of trainings that are paired by seed: means, ratios and shares of another effect, with 95 % intervals.

Seeds are independent and their values normal, on the logarithmic scale where that is asked for.
"""

from __future__ import annotations

import numpy as np
import scipy


def mean_interval(values: np.ndarray) -> list[float] | None:
    """Of the mean over seeds [seed], Student t with seeds - 1 degrees of freedom; None with one seed.

    Examples:
        >>> [round(end, 1) for end in mean_interval(np.array([1.0, 3.0]))]  # two seeds say little
        [-10.7, 14.7]
    """
    if len(values) < 2:
        return None
    width = _t(len(values)) * values.std(ddof=1) / np.sqrt(len(values))
    return [float(values.mean() - width), float(values.mean() + width)]


def share_of_effect(effects: np.ndarray, reference: np.ndarray) -> tuple[float | None, list[float] | None]:
    """theta = mean(effects) / mean(reference) with the interval of Fieller's theorem.

        { theta : (x - theta y)^2 <= t_{S-1}^2 (s_xx - 2 theta s_xy + theta^2 s_yy) / S }

    x, y are the means over S seeds, s their covariances (Fieller, *JRSS B* 16, 1954). The set is an interval where
    that of y leaves out 0. Where it does not, the reference has no effect that a share could be of.

    Args:
        effects: of the arm, one a seed [seed].
        reference: what the same seeds' effects are held against [seed].

    Returns:
        The share and its interval; None and None where the interval of the reference holds 0, or there is none.

    Examples:
        >>> theta, interval = share_of_effect(np.array([0.9, 1.0, 1.1]), np.array([1.8, 2.0, 2.2]))
        >>> round(theta, 3), [round(end, 3) for end in interval]  # one half, seed by seed
        (0.5, [0.5, 0.5])
        >>> share_of_effect(np.array([0.9, 1.0, 1.1]), np.array([-1.0, 0.1, 1.0]))  # of no effect there is no share
        (None, None)
    """
    interval = mean_interval(reference)
    if interval is None or interval[0] <= 0 <= interval[1]:
        return None, None
    x, y = effects.mean(), reference.mean()
    xx, xy, _, yy = _t(len(effects)) ** 2 / len(effects) * np.cov(effects, reference).ravel()
    # A quadratic in theta, a theta^2 - 2 b theta + c <= 0 with a > 0; theta = x / y is within it.
    a, b, c = y**2 - yy, x * y - xy, x**2 - xx
    width = np.sqrt(max(b**2 - a * c, 0.0))
    return float(x / y), [float((b - width) / a), float((b + width) / a)]


def _t(num_seeds: int) -> float:
    return float(scipy.special.stdtrit(num_seeds - 1, 0.975))
