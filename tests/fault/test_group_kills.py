"""Chain groups, a chain on two ranks on two nodes: a rank dies, a whole group dies, and the numbers are the same."""

from __future__ import annotations

import os
import signal

import failures
import pytest
from failures import actors, beside, events, kill, middle
from shared_ray import joined
from study_models import make_study, study_config

from patterning_dist.driver import run_stages
from patterning_dist.storage.run import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.extended]
# Sums over the ranks come in the same order after a restart: bit-equal where this was tried, equal to rounding by law.
TOLERANCE = 1e-6


@pytest.fixture(scope="module", autouse=True)
def driver(cluster):
    with joined(cluster.address):
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    file = make_study(tmp_path_factory.mktemp("study"))
    changes = (
        "model.checkpoints=[final]",
        "sampling.components=[{name: layer.0.head.1}]",
        "sampling.num_chains=2",
        "sampling.num_draws=100",
        "sampling.ranks_per_chain=2",
    )
    return study_config(file, *failures.LONG, *changes)


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory):
    run = RunDirectory(tmp_path_factory.mktemp("undisturbed") / "run")
    run_stages(study, ["sample"], run.path)
    assert not events(run, "chain_lost")
    return failures.results(run)


def test_a_rank(cluster, study, whole, tmp_path):
    run = RunDirectory(tmp_path / "run")

    with beside(run_stages, study, ["sample"], run.path) as until:
        for rank in range(2):
            until("progress", lambda rank=rank: middle(run, 3 + 4 * rank) and len(actors(cluster, "ChainRank")) == 2)
            kill(actors(cluster, "ChainRank")[rank])
            until("the loss", lambda rank=rank: len(events(run, "chain_lost")) > rank)
    lost = events(run, "chain_lost")
    assert len(lost) == 2
    for event in lost:
        assert event["reason"].startswith("rank ")
        assert "of chain group 0 on node" in event["reason"]
    assert max(event["draws"] for event in lost) > 0
    failures.assert_same(failures.results(run), whole, TOLERANCE)


def test_a_rank_that_is_stopped(cluster, study, whole, tmp_path):
    """The other rank waits for it, and neither makes progress: the group is ended, the stopped process with it."""
    run = RunDirectory(tmp_path / "run")
    hasty = study.model_copy(update={"sampling": study.sampling.model_copy(update={"progress_timeout": 10.0})})
    with beside(run_stages, hasty, ["sample"], run.path) as until:
        until("progress", lambda: middle(run) and len(actors(cluster, "ChainRank")) == 2)
        stopped = actors(cluster, "ChainRank")[1]
        os.kill(stopped, signal.SIGSTOP)
        until("the loss", lambda: events(run, "chain_lost"))
        until("its end", lambda: not os.path.exists(f"/proc/{stopped}"))
    assert events(run, "chain_lost")[0]["reason"].startswith("no progress for ")
    failures.assert_same(failures.results(run), whole, TOLERANCE)


def test_a_whole_group(cluster, study, whole, tmp_path):
    run = RunDirectory(tmp_path / "run")

    with beside(run_stages, study, ["sample"], run.path) as until:
        until("progress", lambda: middle(run) and len(actors(cluster, "ChainRank")) == 2)
        (watcher,) = actors(cluster, "ChainGroup")
        for process in [watcher, *actors(cluster, "ChainRank")]:
            kill(process)
        until("the loss", lambda: events(run, "chain_lost"))
    (lost,) = events(run, "chain_lost")
    assert 0 < lost["draws"] < 100
    failures.assert_same(failures.results(run), whole, TOLERANCE)
