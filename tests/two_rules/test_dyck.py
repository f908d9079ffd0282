"""Bracket strings are as uniform as is said: chi-squared against all strings that there are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from scipy.stats import chisquare

from patterning_dist.experiments.two_rules import dyck

NUMBER = 60_000


def every(length: int, kept: Callable[[np.ndarray], np.ndarray]) -> list[bytes]:
    strings = np.array(list(product([1, -1], repeat=length)), np.int8)
    return sorted(string.tobytes() for string in strings[kept(strings)])


def counts(strings: np.ndarray, of: list[bytes]) -> np.ndarray:
    found, number = np.unique(strings, axis=0, return_counts=True)
    counted = dict(zip((string.tobytes() for string in found), number, strict=True))
    assert not counted.keys() - set(of), "a string that is none of them"
    return np.array([counted.get(string, 0) for string in of])


@pytest.mark.parametrize(("length", "catalan"), [(2, 1), (4, 2), (6, 5), (8, 14), (10, 42)])
def test_dyck_words_are_uniform(length: int, catalan: int) -> None:
    words = every(length, dyck.is_balanced)
    assert len(words) == catalan
    drawn = counts(dyck.dyck_words(np.random.default_rng(length), NUMBER, length), words)
    assert drawn.sum() == NUMBER
    if catalan > 1:
        assert chisquare(drawn).pvalue > 1e-3


def test_equal_and_unequal_counts_are_uniform() -> None:
    rng = np.random.default_rng(1)
    equal = every(6, lambda strings: strings.sum(axis=1) == 0)
    unequal = every(6, lambda strings: strings.sum(axis=1) != 0)
    assert (len(equal), len(unequal)) == (20, 44)
    assert chisquare(counts(dyck.equal_counts(rng, NUMBER, 6), equal)).pvalue > 1e-3
    assert chisquare(counts(dyck.unequal_uniform(rng, NUMBER, 6), unequal)).pvalue > 1e-3


def test_stratified_strings_are_uniform_given_kind_and_depth() -> None:
    rng = np.random.default_rng(2)
    strings = dyck.unequal_stratified(rng, 3 * NUMBER, 8)
    assert (strings.sum(axis=1) != 0).all()
    below = dyck.depths(strings) < 0
    first_below = np.where(below.any(axis=1), below.argmax(axis=1), -1)
    never, at_once, late = strings[:NUMBER], strings[NUMBER : 2 * NUMBER], strings[2 * NUMBER :]
    assert (first_below[:NUMBER] == -1).all()
    assert (first_below[NUMBER : 2 * NUMBER] == 0).all()
    assert (first_below[2 * NUMBER :] >= 4).all()
    assert (never.sum(axis=1) > 0).all()
    # .4, .3, .2, .1 of depths 2, 4, 6, 8; late breaks cannot end below 4, which leaves .4 and .3.
    for part, depths, shares in (
        (never, (2, 4, 6, 8), (0.4, 0.3, 0.2, 0.1)),
        (at_once, (2, 4, 6, 8), (0.4, 0.3, 0.2, 0.1)),
        (late, (2, 4), (4 / 7, 3 / 7)),
    ):
        found = np.array([(abs(part.sum(axis=1)) == depth).sum() for depth in depths])
        assert chisquare(found, np.array(shares) * NUMBER).pvalue > 1e-3

    def is_never_to_two(all_strings: np.ndarray) -> np.ndarray:
        return (dyck.depths(all_strings).min(axis=1) >= 0) & (all_strings.sum(axis=1) == 2)

    to_two = never[never.sum(axis=1) == 2]
    assert chisquare(counts(to_two, every(8, is_never_to_two))).pvalue > 1e-3
