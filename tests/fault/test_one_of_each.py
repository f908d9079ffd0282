"""A chain worker, an aggregator shard and a whole node, killed in one run: its numbers are the undisturbed ones.

Every other moment is tried without processes in ``tests/unit/test_deaths.py``, and with them by ``make test-all``. The
other kinds of processes are killed elsewhere: a rank of a chain group in ``tests/ray/test_chain_groups.py``, a training
worker in ``tests/ray/test_retraining.py``, a driver in ``tests/end_to_end/test_signals.py``.
"""

from __future__ import annotations

import re

import failures
import pytest
import ray
from failures import HoldingStorage, actors, beside, events, kill, long_run, middle, pushes
from shared_ray import joined
from tiny_run import quiet

from patterning_dist.errors import PatterningError
from patterning_dist.stages.sample import sample

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def driver(cluster):
    with joined(cluster.address):
        yield


def test_a_worker_a_shard_and_a_node(cluster, undisturbed, tiny_run, tmp_path):
    """While a shard is inside ``push`` no chain can end, so that each kill finds the run under way."""
    config, run = long_run(tiny_run, tmp_path / "run")
    run.storage = HoldingStorage(run.path)
    with beside(sample, config, run, quiet()) as until:
        until(
            "both chains under way", lambda: len(middle(run, least=1)) == len(actors(cluster, "ModelWorker.chain")) == 2
        )
        (run.path / "hold-write").touch()
        held = until("a shard inside push", lambda: run.storage.held("write"))
        killed = actors(cluster, "ModelWorker.chain")[0]
        kill(killed)
        until("the loss", lambda: events(run, "chain_lost"))
        until(
            "another worker",
            lambda: killed not in (now := actors(cluster, "ModelWorker.chain")) and len(now) == 2,
        )
        cluster.remove_node(min(cluster.worker_nodes, key=id), allow_graceful=False)
        until("the loss of a node", lambda: len(events(run, "chain_lost")) > 1)
        cluster.add_node(num_cpus=1)
        if held in actors(cluster, "AggregatorShard"):  # it was not on that node
            kill(held)
        before = pushes(run)
        until("both shards again", lambda: pushes(run) > before + 6 and len(actors(cluster, "AggregatorShard")) == 2)
    assert max(event["draws"] for event in events(run, "chain_lost")) > 0
    failures.assert_same(failures.results(run), undisturbed)
    assert not list(run.path.glob("sampling/*/checkpoints/*"))


def test_a_worker_that_no_node_has_room_for_is_refused_at_once(cluster, tiny_run, tmp_path):
    """Two nodes of one CPU are not one of two."""
    failures.wait_for("two CPUs", lambda: ray.cluster_resources().get("CPU") == 2)
    config, run = long_run(tiny_run, tmp_path / "run", "sampling.threads_per_worker=2")
    with pytest.raises(PatterningError) as caught:
        sample(config, run, quiet())
    assert re.fullmatch(
        "a worker needs 2 CPU on one node; the Ray cluster has 1 CPU on .+, 1 CPU on .+, 0 CPU on .+; "
        "lower sampling.threads_per_worker or add nodes",
        str(caught.value),
    )
