"""Shares of an effect against closed forms; simulated coverage is in tests/statistical/test_arm_comparisons.py."""

from __future__ import annotations

import numpy as np
import pytest

from patterning_dist.response.paired import mean_interval, share_of_effect

T_2 = 4.302652730  # 97.5 % point of Student's t with two degrees of freedom


def test_the_mean_has_students_interval() -> None:
    width = T_2 * 1.0 / np.sqrt(3)
    assert mean_interval(np.array([1.0, 2.0, 3.0])) == pytest.approx([2 - width, 2 + width])
    assert mean_interval(np.array([1.0])) is None


def test_a_reference_without_error_is_a_division() -> None:
    share, interval = share_of_effect(np.array([1.0, 2.0, 3.0]), np.full(3, 4.0))
    width = T_2 / np.sqrt(3) / 4
    assert share == 0.5 and interval == pytest.approx([0.5 - width, 0.5 + width])


def test_ends_are_the_shares_that_a_t_test_of_the_paired_seeds_just_allows() -> None:
    effects, reference = np.array([0.9, 1.1, 1.6, 0.7]), np.array([-2.2, -1.9, -3.0, -2.4])
    share, interval = share_of_effect(effects, reference)
    assert share == pytest.approx(effects.mean() / reference.mean()) and interval[0] < share < interval[1] < 0
    for end in interval:
        held = mean_interval(effects - end * reference)
        assert min(abs(held[0]), abs(held[1])) < 1e-12
    same, ends = share_of_effect(reference, reference)
    assert same == 1 and ends == pytest.approx([1, 1], abs=1e-6)


@pytest.mark.parametrize("reference", [[1.0, -0.9, 0.5], [2.0]])
def test_there_is_no_share_of_an_effect_that_is_not_clear(reference: list[float]) -> None:
    assert share_of_effect(np.ones(len(reference)), np.array(reference)) == (None, None)
