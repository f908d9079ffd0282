"""Losses of the pool are grouped by what the task knows of them: token, domain or label."""

from __future__ import annotations

import numpy as np
import pytest

from patterning_dist.errors import PatterningError
from patterning_dist.stages.masses import mass_groups


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
    with pytest.raises(PatterningError, match="'token' is not known of these samples; nothing is, so remove the key"):
        mass_groups(Unknown(), {"sample_id": np.arange(3)}, "token")
