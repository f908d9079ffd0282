"""Workers between two stages: who keeps them, who takes them, and when they end."""

from __future__ import annotations

import pytest
import ray

from patterning_dist.runtime.resources import Resources
from patterning_dist.runtime.spares import Spares

ONE, TWO = Resources("a worker", 1), Resources("a training", 2)


@pytest.fixture
def killed(monkeypatch):
    names = []
    monkeypatch.setattr(ray, "kill", names.append)
    return names


def test_a_worker_waits_for_the_next_stage_with_the_same_needs_whatever_it_is_called(killed):
    spares = Spares()
    with spares.open():
        spares.keep(ONE, "first")
        spares.keep(ONE, "second")
        assert spares.take(Resources("a training", 1, keys={"training.threads_per_worker": 1}), 2) == [
            "first",
            "second",
        ]
        assert spares.take(ONE, 2) == []
    assert killed == []  # they are somebody else's now


def test_what_does_not_suit_makes_room_and_so_do_those_that_are_too_many(killed):
    spares = Spares()
    with spares.open():
        for name in ("first", "second"):
            spares.keep(ONE, name)
        spares.keep(TWO, "wide")
        assert spares.take(ONE, 1) == ["first"]
        assert sorted(killed) == ["second", "wide"]


def test_the_outermost_session_ends_them_and_outside_of_one_none_is_kept(killed):
    spares = Spares()
    with spares.open():
        with spares.open():
            spares.keep(ONE, "first")
        assert killed == []
    assert killed == ["first"]
    spares.keep(ONE, "second")
    assert killed == ["first", "second"]
    with spares.open():
        assert spares.take(ONE, 1) == []


def test_a_cluster_that_is_gone_hides_nothing(monkeypatch):
    def gone(worker):
        raise ray.exceptions.RaySystemError("no cluster")

    monkeypatch.setattr(ray, "kill", gone)
    spares = Spares()
    with pytest.raises(KeyError, match="what ended the run"), spares.open():
        spares.keep(ONE, "first")
        raise KeyError("what ended the run")
