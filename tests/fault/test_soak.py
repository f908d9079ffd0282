"""Fifty and more random kills in one run, and the numbers of the undisturbed one.

The kills are spread over the progress of the run, not over its time: none of them comes too late on a fast machine.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections import Counter

import failures
import pytest
from failures import actors, events, kill, long_run, pushes, wait_for

NUM_KILLS = 60
# Per hundred; drivers and nodes take the longest to come back.
VICTIMS = {"ModelWorker": 50, "AggregatorShard": 35, "node": 10, "driver": 5}


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.timeout(900)
def test_fifty_random_kills(cluster, undisturbed, tiny_run, tmp_path):
    _, run = long_run(tiny_run, tmp_path / "run")
    chosen, kills = random.Random(11), Counter[str]()
    total = 2 * 3 * 40  # subjects, chains, pushes
    # The last quarter without kills: dozens of pushes may pass between two looks.
    moments = sorted(chosen.randrange(total * 3 // 4) for _ in range(NUM_KILLS))
    driver = failures.start_driver(run, cluster)
    for moment in moments:
        wait_for("progress", lambda moment=moment, driver=driver: pushes(run) >= moment or driver.poll() is not None)
        time.sleep(chosen.uniform(0, 0.2))
        assert driver.poll() is None, f"the driver was gone after {kills.total()} kills: see {run.path}.log"
        (kind,) = chosen.choices(list(VICTIMS), list(VICTIMS.values()))
        driver = _kill(kind, cluster, run, driver, chosen)
        kills[kind] += 1
    failures.finish(driver, run)
    failures.assert_same(failures.results(run), undisturbed)
    print(f"{kills.total()} kills: {dict(kills)}; {len(events(run, 'chain_lost'))} chains lost their worker")
    assert kills.total() >= 50
    assert set(kills) == set(VICTIMS)


def _kill(kind, cluster, run, driver, chosen) -> subprocess.Popen:
    """Kill one of a kind; the driver that goes on."""
    if kind == "driver":
        driver.kill()
        driver.wait()
        return failures.start_driver(run, cluster)
    if kind == "node":
        # The replacement first: it is another machine, and the run shall not stand still for it.
        victim = chosen.choice(sorted(cluster.worker_nodes, key=lambda node: node.unique_id))
        cluster.add_node(num_cpus=1)
        cluster.remove_node(victim, allow_graceful=False)
        return driver
    found = wait_for(f"a {kind}", lambda: actors(cluster, kind) or driver.poll() is not None)
    assert found is not True, f"the driver was gone before a {kind} could be killed: see {run.path}.log"
    kill(chosen.choice(found))
    return driver
