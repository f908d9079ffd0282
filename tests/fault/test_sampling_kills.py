"""Whatever dies while chains are sampled, and whenever: the results are those of the undisturbed run, bit for bit.

Real processes of a real Ray cluster, three raylets on this machine, are killed as a machine that fails would kill them.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import time

import failures
import numpy as np
import pytest
import ray
from failures import HoldingStorage, actors, beside, events, kill, long_run, middle, pushes, snapshots, wait_for
from rich.console import Console
from shared_ray import joined
from tiny_run import quiet

from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.runtime import workforce
from patterning_dist.stages.sample import sample

pytestmark = [pytest.mark.slow, pytest.mark.extended]


@pytest.fixture
def nodes(cluster):
    """Two nodes again after every test, and the driver in this process connected to the head."""
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=1)
    with joined(cluster.address):
        wait_for("two CPUs", lambda: ray.cluster_resources().get("CPU") == 2)
        yield cluster


def test_workers(nodes, undisturbed, tiny_run, tmp_path):
    config, run = long_run(tiny_run, tmp_path / "run")
    with beside(sample, config, run, quiet()) as until:
        for number in range(3):
            before = pushes(run)
            until("progress", lambda before=before: pushes(run) > before + 12 and actors(nodes, "ModelWorker.chain"))
            kill(actors(nodes, "ModelWorker.chain")[number % 2 - 1])
            until("the loss", lambda number=number: len(events(run, "chain_lost")) > number)
    lost = events(run, "chain_lost")
    assert len(lost) == 3
    assert any(0 < event["draws"] < 200 for event in lost)
    failures.assert_same(failures.results(run), undisturbed)
    assert not list(run.path.glob("sampling/*/checkpoints/*"))


def test_shards_at_random_moments(nodes, undisturbed, tiny_run, tmp_path):
    config, run = long_run(tiny_run, tmp_path / "run")
    chosen, killed = random.Random(4), []

    with beside(sample, config, run, quiet()) as until:
        for _ in range(5):
            goal = pushes(run) + chosen.randrange(1, 12)
            until("progress", lambda goal=goal: pushes(run) > goal)
            time.sleep(chosen.uniform(0, 0.3))
            victim = chosen.choice(until("both shards", lambda: len(s := actors(nodes, "Aggreg")) == 2 and s))
            kill(victim)
            killed.append(victim)
    assert len(set(killed)) == 5
    failures.assert_same(failures.results(run), undisturbed)


@pytest.mark.parametrize("place", ["write", "delete"])
def test_a_shard_before_its_acknowledgement(nodes, undisturbed, tiny_run, tmp_path, place):
    """It dies inside ``push``: the push is taken in, in memory only or durably, and not answered."""
    config, run = long_run(tiny_run, tmp_path / "run")
    run.storage = HoldingStorage(run.path)

    with beside(sample, config, run, quiet()) as until:
        until("a chain under way", lambda: middle(run))
        (run.path / f"hold-{place}").touch()
        victim = until("a shard inside push", lambda: run.storage.held(place))
        assert victim in actors(nodes, "AggregatorShard")
        kill(victim)
    assert not (run.path / f"hold-{place}").exists()
    failures.assert_same(failures.results(run), undisturbed)


def test_a_shard_after_its_acknowledgement(nodes, undisturbed, tiny_run, tmp_path):
    """Checkpoints go when all shards have answered that they hold durably what was pushed before."""
    config, run = long_run(tiny_run, tmp_path / "run")
    first = {}

    def needed_no_more():
        return any(min(now) > max(first.setdefault(chain, now)) for chain, now in snapshots(run, "checkpoints").items())

    with beside(sample, config, run, quiet()) as until:
        until("a checkpoint needed no more", needed_no_more)
        for victim in actors(nodes, "AggregatorShard"):
            kill(victim)
    failures.assert_same(failures.results(run), undisturbed)


def test_a_node_with_room_left_on_the_other(nodes, undisturbed, tiny_run, tmp_path):
    config, run = long_run(tiny_run, tmp_path / "run")
    with beside(sample, config, run, quiet()) as until:
        until("both workers at work", lambda: middle(run) and len(actors(nodes, "ModelWorker.chain")) == 2)
        nodes.remove_node(min(nodes.worker_nodes, key=id), allow_graceful=False)
        until("the loss", lambda: events(run, "chain_lost"))
    failures.assert_same(failures.results(run), undisturbed)


def test_all_nodes_with_a_replacement_later(nodes, undisturbed, tiny_run, tmp_path, monkeypatch):
    config, run = long_run(tiny_run, tmp_path / "run")
    monkeypatch.setattr(workforce, "_SAID_AFTER", 1.0)
    shown = Progress(Console(file=io.StringIO(), width=200))
    waiting = "waiting for a worker: a worker needs 1 CPU; free are 0 of 0 CPU on "

    with beside(sample, config, run, shown) as until:
        until("chains under way", lambda: middle(run))
        for node in list(nodes.worker_nodes):
            nodes.remove_node(node, allow_graceful=False)
        until("what is waited for", lambda: waiting in shown.console.file.getvalue())
        nodes.add_node(num_cpus=1)
    failures.assert_same(failures.results(run), undisturbed)


def test_room_that_does_not_come_back_is_a_bounded_wait(nodes, undisturbed, tiny_run, tmp_path, monkeypatch):
    config, run = long_run(tiny_run, tmp_path / "run")
    with pytest.raises(PatterningError) as caught, beside(sample, config, run, quiet()) as until:
        until("chains under way", lambda: middle(run))
        monkeypatch.setattr(workforce, "_SAID_AFTER", 1.0)
        monkeypatch.setattr(workforce, "_ROOM_TIMEOUT", 8.0)
        for node in list(nodes.worker_nodes):
            nodes.remove_node(node, allow_graceful=False)
    # Ray takes seconds to count a node as dead, on a busy machine more than these.
    assert re.fullmatch(
        r"no worker could be started within 8 s: a worker needs 1 CPU; free are (0 of [01] CPU on [^,]+(, |; )){1,3}"
        "wait for other work to end or add nodes, and run the same command again to resume",
        str(caught.value),
    )
    assert 0 < pushes(run) < 2 * 3 * 40
    monkeypatch.undo()
    nodes.add_node(num_cpus=1)
    sample(config, run, quiet())
    assert events(run, "subject_resumed")
    failures.assert_same(failures.results(run), undisturbed)


def test_a_chain_that_fails_every_time_is_left_out(nodes, tiny_run, tmp_path):
    """Its process dies at the same draw every time; the other chains are what they are without it."""
    outcomes, deadly = [], 0
    for name in ("edge", "deadly_edge"):
        changes = (
            "sampling.components=[{name: everything}]",
            "sampling.num_draws=60",
            "sampling.max_chain_failures=1",
            f"sampling.observables.0={{kind: function, names: [edge], path: 'failures:{name}'}}",
        )
        config, run = long_run(tiny_run, tmp_path / name, *changes)
        sample(config, run, quiet())
        outcomes.append(failures.results(run))
        if name == "edge":
            peaks = outcomes[0]["sampling/everything/traces/edge"].max(axis=1)
            deadly = int(peaks.argmax())
            failures.set_edge(np.sort(peaks)[-2:].mean())
    healthy, disturbed = outcomes
    assert list(disturbed["sampling/everything/excluded"]) == [deadly]
    for chain in {0, 1, 2} - {deadly}:
        for name in [name for name in healthy if name.startswith(f"sampling/everything/{chain}/")]:
            assert (healthy[name] == disturbed[name]).all(), name

    lost = events(run, "chain_lost")
    assert len(lost) >= 2
    assert {event["chain"] for event in lost} == {deadly}
    reason = json.loads((run.path / "sampling/everything/chains.json").read_text())[deadly]["reason"]
    assert reason.startswith(f"lost 2 times without getting beyond draw {lost[-1]['draws']}; last: ")
    diagnostics = json.loads((run.path / "response" / "diagnostics.json").read_text())["subjects"]["everything"]
    assert diagnostics["excluded"] == [{"chain": deadly, "reason": reason}]
    assert [(e["chain"], e["reason"]) for e in events(run, "chain_excluded")] == [(deadly, reason)]


def test_drivers_that_are_killed_interrupted_and_preempted(cluster, undisturbed, tiny_run, tmp_path):
    """One run by four drivers: three leave in the middle, each goes on from where the one before was."""
    _, run = long_run(tiny_run, tmp_path / "run")
    for number, (sent, code) in enumerate(((signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143))):
        before = pushes(run)
        driver = failures.start_driver(run, cluster)
        wait_for("progress", lambda before=before: pushes(run) > before + 15 and middle(run))
        left_at = middle(run)
        assert driver.poll() is None
        driver.send_signal(sent)
        told = time.monotonic()
        assert driver.wait(timeout=30) == code
        assert len(events(run, "subject_resumed")) == 2 * number
        # Nothing durable goes with the driver; after a notice all of what was pushed is durable.
        assert pushes(run) > before + 15
        if sent != signal.SIGKILL:
            assert time.monotonic() - told < 30
            for chain, numbers in middle(run).items():
                assert max(numbers) >= max(left_at.get(chain, [0]))
        assert not (run.path / "response" / "diagnostics.json").exists()
        wait_for("the workers of this driver to go", lambda: not actors(cluster, "ModelWorker"))
    failures.finish(failures.start_driver(run, cluster), run)
    failures.assert_same(failures.results(run), undisturbed)


def test_the_head(undisturbed, tiny_run, tmp_path, monkeypatch):
    """The cluster is gone with it; the same command on another goes on with the run."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "15")  # a minute by default
    _, run = long_run(tiny_run, tmp_path / "run")
    with failures.cluster_of(1) as cluster:
        driver = failures.start_driver(run, cluster)
        wait_for("progress", lambda: pushes(run) > 15 and middle(run))
        for process in ("gcs_server", "raylet"):
            os.kill(cluster.head_node.all_processes[process][0].process.pid, signal.SIGKILL)
        assert driver.wait(timeout=120) != 0
    reached = pushes(run)
    assert reached > 15
    with failures.cluster_of(1) as cluster:
        failures.finish(failures.start_driver(run, cluster), run)
    assert len(events(run, "subject_resumed")) == 2
    failures.assert_same(failures.results(run), undisturbed)
