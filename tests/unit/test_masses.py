"""Losses of the pool are grouped by what the task knows of them: token, domain or label."""

from __future__ import annotations

import numpy as np
import pytest

from patterning_dist.errors import PatterningError
from patterning_dist.stages.masses import dealt, mass_groups


class Tokens:
    """As much of a task as groups need: three sequences of three predicted tokens."""

    train, key = range(3), "sequence_id"

    def index(self, samples, ids):
        return {self.key: ids, "domain": np.array(["poems", "fables", "poems"], object)[ids]}

    def entries(self, samples, ids):
        return {"token": np.array([[7, 5, 7], [5, 5, 9], [9, 7, 2]])[ids]}


class Labelled(Tokens):
    """One loss a sample, with a class."""

    key = "sample_id"

    def index(self, samples, ids):
        return {self.key: ids, "label": np.array([4, 0, 4])[ids]}

    def entries(self, samples, ids):
        return {}


class Unknown(Labelled):
    def index(self, samples, ids):
        return {self.key: ids}


# The second loss of the first sequence does not count.
INDEX = {"sequence_id": np.array([0, 0, 1, 1, 1, 2, 2, 2]), "position": np.array([1, 3, 1, 2, 3, 1, 2, 3], np.int16)}


def test_entries_that_share_what_is_kept_are_one_group():
    np.testing.assert_array_equal(mass_groups(Tokens(), INDEX, "token"), [2, 2, 1, 1, 3, 3, 2, 0])
    np.testing.assert_array_equal(mass_groups(Tokens(), INDEX, "domain"), [1, 1, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(mass_groups(Labelled(), {"sample_id": np.arange(3)}, "label"), [1, 0, 1])


def test_what_is_not_known_is_refused():
    with pytest.raises(
        PatterningError, match=r"solve\.keep_mass: 'label' is not known .*; expected one of domain, token"
    ):
        mass_groups(Tokens(), INDEX, "label")
    with pytest.raises(PatterningError, match="'token' is not known of these samples; nothing is, so remove it"):
        mass_groups(Unknown(), {"sample_id": np.arange(3)}, "token")


def test_permuted_weights_stay_in_their_groups():
    rng = np.random.default_rng(3)
    weights, groups = rng.gamma(2.0, size=600), rng.integers(0, 3, 600)
    groups[:2] = 3, 4  # alone in theirs
    found = dealt(weights, groups, seed=1)
    for group in range(5):
        np.testing.assert_array_equal(np.sort(found[groups == group]), np.sort(weights[groups == group]))
    np.testing.assert_array_equal(found[:2], weights[:2])
    # Of 598 entries each stays where it was with a chance of 1 in some 200: 3 do, 5 standard deviations are 9 more.
    assert (found[2:] == weights[2:]).sum() <= 12
    assert not np.array_equal(found, dealt(weights, groups, seed=2))
    free = dealt(weights, None, seed=1)
    np.testing.assert_array_equal(np.sort(free), np.sort(weights))
    assert abs(np.bincount(groups, free - weights)[:3]).max() > 1
    np.testing.assert_array_equal(free, dealt(weights, np.zeros(600, int), seed=1))
