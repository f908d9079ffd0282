"""Times until an event of runs that may end before it: curves, a test, and the ratio of two arms' hazards.

A run has a time and says whether the event came then; where it did not, the run is censored at its last time: the event
comes later, if it comes. Runs are independent of each other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy

_LEVEL = 0.95
_FAR = 50.0  # of log hazard ratios: beyond it a likelihood has reached its limit, e^-50 being below rounding


class Runs(NamedTuple):
    """Runs of one arm.

    Attributes:
        times: of the event, or of the last look at a run that did not have it [run].
        happened: whether the event came then, bool [run].
    """

    times: np.ndarray
    happened: np.ndarray


class Curve(NamedTuple):
    """Share of runs in which the event has not come, from each of its times on [time].

    Attributes:
        times: at which an event came, ascending.
        share: from that time until the next.
        low: end of the pointwise 95 % interval; NaN where the share is 0.
        high: likewise.
    """

    times: np.ndarray
    share: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def median(self) -> float | None:
        """First time by which half of the runs have had the event; None where that is not reached."""
        return _first_below_half(self.times, self.share)

    @property
    def median_interval(self) -> tuple[float | None, float | None]:
        """Times at which the interval of the share holds one half (Brookmeyer & Crowley 1982); None: not reached."""
        # Where no share is left there is no interval of it either, and both ends have fallen below one half.
        low, high = (np.where(np.isnan(end), 0.0, end) for end in (self.low, self.high))
        return _first_below_half(self.times, low), _first_below_half(self.times, high)


class LogRank(NamedTuple):
    """The log-rank test of two arms; None where no time of an event has runs of both at risk.

    Attributes:
        chi2: with one degree of freedom.
        p: its tail.
    """

    chi2: float | None
    p: float | None


class HazardRatio(NamedTuple):
    """Hazard of the first arm over that of the second; None where the data say nothing of it.

    Attributes:
        value: 0 or infinity where one arm has all of its events after the other has no run left at risk.
        interval: 95 %, by the profile of the likelihood; an end is 0 or infinity together with the value.
    """

    value: float | None
    interval: tuple[float, float] | None


def kaplan_meier(runs: Runs) -> Curve:
    """S(t) = prod_{t_i <= t} 1 - d_i / n_i, with pointwise intervals on the scale of log(-log S).

        var log S = sum d_i / (n_i (n_i - d_i)) (Greenwood 1926),   S^exp(-+ 1.96 se(log S) / log S)

    d_i events at t_i among n_i runs at risk (Kaplan & Meier, *JASA* 53, 1958; the interval: Kalbfleisch & Prentice,
    *The Statistical Analysis of Failure Time Data*, 1980, ch. 1.3). A run that is censored at t_i is at risk there.

    Examples:
        >>> runs = Runs(np.array([1.0, 2.0, 2.0, 3.0]), np.array([True, True, False, True]))  # one is censored at 2
        >>> curve = kaplan_meier(runs)
        >>> curve.share.round(2), curve.median  # 1 - 1/4, times 1 - 1/3, times 1 - 1
        (array([0.75, 0.5 , 0.  ]), 2.0)
    """
    times = np.unique(runs.times[runs.happened])
    at_risk, events = _at_risk(runs, times)
    share = np.cumprod(1 - events / at_risk)
    greenwood = np.cumsum(events / (at_risk * np.maximum(at_risk - events, 1)))  # where no run is left it is not used
    log_share = np.log(np.where(at_risk > events, share, np.nan))
    power = np.exp(scipy.special.ndtri(0.5 + _LEVEL / 2) * np.sqrt(greenwood) / np.abs(log_share))
    return Curve(times, share, share**power, share ** (1 / power))


def log_rank(first: Runs, second: Runs) -> LogRank:
    """chi2 = (sum d_1i - E_i)^2 / sum V_i with the mean and the variance of hypergeometric counts.

        E_i = d_i n_1i / n_i,    V_i = d_i (n_i - d_i) n_1i n_2i / (n_i^2 (n_i - 1))

    (Mantel, *Cancer Chemotherapy Reports* 50, 1966). chi^2 is the law for many events: with 3, 4 and 8 runs an
    arm, none of them censored, p < .05 has probability .10, .06 and .06 where the arms do not differ.

    Examples:
        >>> runs = Runs(np.array([1.0, 2.0, 3.0]), np.array([True, True, False]))
        >>> log_rank(runs, runs)  # arms that do not differ
        LogRank(chi2=0.0, p=1.0)
    """
    runs, events = _both(first, second)
    num_runs, num_events = runs.sum(axis=0), events.sum(axis=0)
    expected = num_events * runs[0] / num_runs
    variance = num_events * (num_runs - num_events) * runs.prod(axis=0) / (num_runs**2 * np.maximum(num_runs - 1, 1))
    if not variance.sum():
        return LogRank(None, None)
    chi2 = (events[0] - expected).sum() ** 2 / variance.sum()
    return LogRank(float(chi2), float(scipy.special.chdtrc(1, chi2)))


def hazard_ratio(first: Runs, second: Runs) -> HazardRatio:
    """exp b of hazards h_1(t) = e^b h_2(t), where Cox's partial likelihood is largest, ties as Efron counts them.

        l(b) = sum_i b d_1i - sum_{k < d_i} log(n_1i e^b + n_2i - k / d_i (d_1i e^b + d_2i))

    (Cox, *JRSS B* 34, 1972; Efron, *JASA* 72, 1977). l is concave. The interval has every b with
    2 (max l - l(b)) below the 95 % point of chi^2 with one degree of freedom.

    Examples:
        >>> came = np.array([True, True])
        >>> early, late = Runs(np.array([1.0, 2.0]), came), Runs(np.array([3.0, 4.0]), came)
        >>> hazard_ratio(early, late).value, round(hazard_ratio(early, early).value, 6)  # above 1: comes sooner
        (inf, 1.0)
    """
    runs, events = _both(first, second)
    num_events = events.sum(axis=0)
    # As b rises, the slope of term i tends to d_1i - d_i where the first arm is at risk, else to 0; as b falls, to d_1i
    # where the second is. Where all of these are 0, l has no largest value but a limit.
    rising = np.array_equal(events[0], num_events * (runs[0] > 0))
    falling = np.array_equal(events[1], num_events * (runs[1] > 0))
    if rising and falling:
        return HazardRatio(None, None)
    ties = np.concatenate([np.arange(number) / number for number in num_events])
    ours, theirs = np.repeat(runs, num_events, axis=1) - ties * np.repeat(events, num_events, axis=1)

    def likelihood(b: float) -> float:
        return float(b * events[0].sum() - np.log(ours * np.exp(b) + theirs).sum())

    def slope(b: float) -> float:
        return float(events[0].sum() - (ours / (ours + theirs * np.exp(-b))).sum())

    best = _FAR if rising else -_FAR if falling else scipy.optimize.brentq(slope, -_FAR, _FAR)
    level = likelihood(best) - scipy.special.chdtri(1, 1 - _LEVEL) / 2

    def end(far: float) -> float:
        return float(np.exp(scipy.optimize.brentq(lambda b: likelihood(b) - level, best, far)))

    if rising:
        return HazardRatio(np.inf, (end(-_FAR), np.inf))
    if falling:
        return HazardRatio(0.0, (0.0, end(_FAR)))
    return HazardRatio(float(np.exp(best)), (end(-_FAR), end(_FAR)))


def _at_risk(runs: Runs, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs that have not ended before each time, and events at it [time]."""
    own = runs.times[:, None]
    return (own >= times).sum(axis=0), ((own == times) & runs.happened[:, None]).sum(axis=0)


def _both(first: Runs, second: Runs) -> tuple[np.ndarray, np.ndarray]:
    """Runs at risk and events of both arms at every time at which either has an event [arm, time]."""
    times = np.unique(np.concatenate([arm.times[arm.happened] for arm in (first, second)]))
    runs, events = zip(*(_at_risk(arm, times) for arm in (first, second)), strict=True)
    return np.stack(runs), np.stack(events)


def _first_below_half(times: np.ndarray, share: np.ndarray) -> float | None:
    passed = times[share <= 0.5 + 1e-12]  # a product of ratios may miss one half by rounding
    return float(passed[0]) if len(passed) else None
