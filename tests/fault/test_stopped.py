"""Processes that are stopped, not killed: found by their want of progress, and the numbers are the undisturbed ones.

SIGSTOP leaves everything in place, connections included, and no other process is told.
"""

from __future__ import annotations

import os
import signal

import failures
import pytest
from failures import actors, beside, events, long_run, middle
from shared_ray import joined
from tiny_run import quiet

from patterning_dist.stages.sample import sample

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def driver(cluster):
    with joined(cluster.address):
        yield


def test_a_worker_a_shard_and_the_board(cluster, undisturbed, tiny_run, tmp_path):
    """All at once: no chain can end without the shard, and a worker that waits for it is not to be taken for hung."""
    config, run = long_run(tiny_run, tmp_path / "run", "sampling.progress_timeout=10")
    with beside(sample, config, run, quiet()) as until:
        until(
            "both chains under way", lambda: len(middle(run, least=1)) == len(actors(cluster, "ModelWorker.chain")) == 2
        )
        workers = actors(cluster, "ModelWorker.chain")
        stopped = [actors(cluster, "AggregatorShard")[0], workers[0], *actors(cluster, "ProgressBoard")]
        assert len(stopped) == 3
        for process in stopped:
            os.kill(process, signal.SIGSTOP)
        until("the loss", lambda: events(run, "chain_lost"))
        until("all gone", lambda: not any(os.path.exists(f"/proc/{process}") for process in stopped))
        assert workers[1] in actors(cluster, "ModelWorker.chain")
    lost = events(run, "chain_lost")[0]
    assert "no progress for" in lost["reason"] and "sampling.progress_timeout is 10 s" in lost["reason"]
    said = [event["text"] for event in events(run, "stalled")]
    for name in ("the progress board", "aggregator shard", f"{lost['subject']} chain {lost['chain']}"):
        assert any(text.startswith(name) and "has shown nothing for" in text for text in said), said
    for name, remedy in (
        ("the progress board", "and made again"),
        ("aggregator shard", "goes on from its snapshots"),
    ):
        assert any(text.startswith(name) and remedy in text for text in said), said
    failures.assert_same(failures.results(run), undisturbed)
