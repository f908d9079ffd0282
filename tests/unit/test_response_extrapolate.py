"""Regression to the pool: learns what features tell, and says so only for sequences it did not see."""

from __future__ import annotations

import numpy as np
import pytest

from patterning_dist.errors import PatterningError
from patterning_dist.response.extrapolate import extrapolate


def tokens(seed, num_sequences=30, length=20):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(num_sequences), length)
    return rng, groups, rng.normal(size=(len(groups), 3))


def test_learns_a_function_of_the_features_and_reaches_the_pool():
    rng, groups, features = tokens(0)
    signal = lambda x: np.sin(2 * x[:, 0]) + (x[:, 1] > 0)  # noqa: E731
    scores = signal(features) + 0.2 * rng.normal(size=len(groups))
    pool = rng.normal(size=(500, 3))
    got = extrapolate(features, scores, groups, pool, seed=1)
    assert got.correlation.value > 0.85
    assert got.correlation.low < got.correlation.value < got.correlation.high
    assert np.corrcoef(got.predictions, signal(pool))[0, 1] > 0.9
    again = extrapolate(features, scores, groups, pool, seed=1)
    np.testing.assert_array_equal(got.predictions, again.predictions)
    np.testing.assert_array_equal(got.held_out, again.held_out)
    assert got.correlation == again.correlation


def test_what_a_sequence_shares_is_not_counted_as_skill():
    rng, groups, features = tokens(1)
    features[:, 0] = groups  # tells the sequence, and nothing about others
    scores = rng.normal(size=30)[rng.permutation(30)][groups]
    got = extrapolate(features, scores, groups, features, seed=2)
    assert np.corrcoef(got.predictions, scores)[0, 1] > 0.9  # it does fit what it saw
    assert got.correlation.value < 0.4


def test_bad_input_is_named():
    _, groups, features = tokens(2, num_sequences=4)
    scores = np.zeros(80)
    with pytest.raises(PatterningError, match="4 sequences, expected at least 5"):
        extrapolate(features, scores, groups, features, seed=0)
    with pytest.raises(PatterningError, match="two matrices with the same columns"):
        extrapolate(features, scores, groups, features[:, :2], seed=0)
    with pytest.raises(PatterningError, match="expected 80 finite scores"):
        extrapolate(features, scores[:-1], groups, features, seed=0)
