"""Survival estimates agree with published analyses of a textbook data set, with closed forms, and with each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from patterning_dist.response.survival import Runs, hazard_ratio, kaplan_meier, log_rank


def runs(times: list[float], censored: Sequence[float] = ()) -> Runs:
    """Events at some times, and runs that ended without one at others."""
    happened = np.repeat([True, False], [len(times), len(censored)])
    return Runs(np.array([*times, *censored], dtype=np.float64), happened)


# Weeks of remission under 6-mercaptopurine and placebo (Freireich et al., Blood 21, 1963; Gehan 1965).
DRUG = runs([6, 6, 6, 7, 10, 13, 16, 22, 23], [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35])
PLACEBO = runs([1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23])


def test_the_textbook_curve_and_its_intervals() -> None:
    """As R's survfit has them: shares, and Greenwood's standard errors .1068, .1141, .1282, .1346 of the last four."""
    curve = kaplan_meier(DRUG)
    assert curve.times.tolist() == [6, 7, 10, 13, 16, 22, 23]
    expected = [0.857142857, 0.806722689, 0.752941176, 0.690196078, 0.627450980, 0.537815126, 0.448179272]
    assert curve.share == pytest.approx(expected, abs=1e-9)
    for end, sign in ((curve.low, 1), (curve.high, -1)):
        error = sign * np.log(np.log(end) / np.log(curve.share)) / 1.959963985 * -np.log(curve.share) * curve.share
        assert error[3:] == pytest.approx([0.1068, 0.1141, 0.1282, 0.1346], abs=6e-5)
    assert (curve.median, kaplan_meier(PLACEBO).median) == (23, 8)
    assert curve.median_interval == (13, None) and kaplan_meier(PLACEBO).median_interval == (4, 11)


def test_the_textbook_test_and_hazard_ratio() -> None:
    """R's survdiff (16.7929409892165, p = 4.16880910933453e-05) and coxph (Efron: coefficient -1.5721, ratio .2076)."""
    test, ratio = log_rank(DRUG, PLACEBO), hazard_ratio(DRUG, PLACEBO)
    assert test.chi2 == pytest.approx(16.7929409892165, rel=1e-12)
    assert test.p == pytest.approx(4.16880910933453e-05, rel=1e-10)
    assert math.log(ratio.value) == pytest.approx(-1.5721, abs=5e-5) and ratio.value == pytest.approx(0.2076, abs=5e-5)
    assert ratio.interval[0] < 0.2076 < ratio.interval[1] < 1


def test_without_censoring_the_curve_is_the_share_that_is_left() -> None:
    curve = kaplan_meier(runs([3, 1, 2, 2]))
    assert curve.times.tolist() == [1, 2, 3] and curve.share == pytest.approx([0.75, 0.25, 0])
    # Greenwood's error of log S at 1 is sqrt(1 / (4 * 3)).
    power = math.exp(1.959963985 * math.sqrt(1 / 12) / -math.log(0.75))
    assert (curve.low[0], curve.high[0]) == pytest.approx((0.75**power, 0.75 ** (1 / power)))
    assert np.isnan(curve.low[-1]) and np.isnan(curve.high[-1]) and curve.median == 2
    assert kaplan_meier(runs([1, 2, 3, 4])).median == 2  # exactly one half is left


def test_tied_events_have_hypergeometric_variance() -> None:
    """Of 3 and 5 runs, 2 and 1 have the event at once and the others never: one table of two by two."""
    first, second = runs([1, 1], [9]), runs([1], [9] * 4)
    variance = 3 * 5 * 3 * 5 / (8**2 * 7)
    assert log_rank(first, second).chi2 == pytest.approx((2 - 3 * 3 / 8) ** 2 / variance)


@pytest.mark.parametrize("ties", [False, True])
def test_the_hazard_ratio_is_at_the_top_of_the_partial_likelihood(ties: bool) -> None:
    """Written out over the runs themselves, and looked up on a grid."""
    rng = np.random.default_rng(3)
    times = rng.exponential(size=(2, 12)) * [[1.0], [2.5]]
    times = np.ceil(4 * times) if ties else times
    arms = [Runs(row, rng.uniform(size=12) < 0.8) for row in times]
    b = np.linspace(-4, 6, 20001)
    joined, happened = (np.concatenate([getattr(arm, name) for arm in arms]) for name in ("times", "happened"))
    risk = np.where(np.arange(24)[:, None] < 12, np.exp(b), 1)  # [run, b]
    likelihood = np.zeros_like(b)
    for time in np.unique(joined[happened]):
        now = happened & (joined == time)
        assert ties or now.sum() == 1
        for k in range(now.sum()):
            left = risk[joined >= time].sum(axis=0) - k / now.sum() * risk[now].sum(axis=0)
            likelihood -= np.log(left)
        likelihood += np.log(risk[now]).sum(axis=0)
    found = hazard_ratio(*arms)
    within = b[2 * (likelihood.max() - likelihood) < 3.841459]
    assert math.log(found.value) == pytest.approx(b[likelihood.argmax()], abs=6e-4)
    assert np.log(found.interval) == pytest.approx([within[0], within[-1]], abs=6e-4)


def test_arms_and_runs_may_change_places_and_the_clock_its_speed() -> None:
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(21)
    again = Runs(DRUG.times[shuffled] ** 2, DRUG.happened[shuffled])
    other = Runs(PLACEBO.times**2, PLACEBO.happened)
    ratio, reverse = hazard_ratio(again, other), hazard_ratio(PLACEBO, DRUG)
    for one in (log_rank(again, other), log_rank(PLACEBO, DRUG)):
        assert one == pytest.approx(log_rank(DRUG, PLACEBO))
    assert ratio.value == pytest.approx(1 / reverse.value)
    assert ratio.interval == pytest.approx((1 / reverse.interval[1], 1 / reverse.interval[0]))
    same = hazard_ratio(DRUG, DRUG)
    assert log_rank(DRUG, DRUG).p == pytest.approx(1) and same.value == pytest.approx(1)
    assert same.interval[0] * same.interval[1] == pytest.approx(1)


def test_where_all_events_of_one_arm_come_first_the_ratio_has_one_end() -> None:
    """One run each: l(b) = b - log(e^b + 1), and the end has e^b / (1 + e^b) = exp(-3.8415 / 2)."""
    first, second = runs([1]), runs([], [2])
    odds = math.exp(-3.841458821 / 2)
    assert hazard_ratio(first, second) == (math.inf, (pytest.approx(odds / (1 - odds)), math.inf))
    assert hazard_ratio(second, first) == (0, (0, pytest.approx((1 - odds) / odds)))
    early, late = runs([1, 2, 3]), runs([4, 5, 6])
    assert hazard_ratio(early, late).value == math.inf and hazard_ratio(early, late).interval[0] > 1
    assert log_rank(early, late).p < 0.05


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (runs([], [5, 5]), runs([], [5, 7])),  # no events
        (runs([3, 4]), runs([], [1, 2])),  # no run of the second arm is left when the events come
    ],
)
def test_what_data_say_nothing_of_is_none(first: Runs, second: Runs) -> None:
    assert log_rank(first, second) == (None, None) and hazard_ratio(first, second) == (None, None)
    assert log_rank(second, first) == (None, None) and hazard_ratio(second, first) == (None, None)
    nothing = kaplan_meier(second)
    assert nothing.times.size == 0 and nothing.median is None and nothing.median_interval == (None, None)
