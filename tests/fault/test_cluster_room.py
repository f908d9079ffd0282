"""What a cluster has no room for is refused by plan and by train alike; a Ray started here counts the usable CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from shared_ray import joined
from tiny_run import copy_run, quiet, tiny_config

from patterning_dist.driver import experiment_of
from patterning_dist.errors import PatterningError
from patterning_dist.stages.plan.plan import plan_run
from patterning_dist.stages.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_two_threads_on_nodes_of_one_cpu_are_refused_with_the_same_words(
    cluster: Cluster, tiny_run: Path, tmp_path: Path
) -> None:
    run = copy_run(tiny_run, tmp_path / "run")
    config = tiny_config(run.path, "training.threads_per_worker=2", "sampling.threads_per_worker=2")
    with joined(cluster.address):
        started = time.monotonic()
        with pytest.raises(PatterningError) as planned:
            stages = list(experiment_of(config).stages(config))
            plan_run(config, stages, run.path, ["prepare", "train"], lambda text: None)
        with pytest.raises(PatterningError) as trained:
            train(config, run, quiet())
    assert time.monotonic() - started < 60
    assert str(planned.value) == str(trained.value)
    name = str(trained.value).partition("has 1 CPU on ")[2].partition(",")[0]
    assert str(trained.value) == (
        f"a training needs 2 CPU on one node; the Ray cluster has 1 CPU on {name}, 1 CPU on {name}, 0 CPU on {name}; "
        "lower training.threads_per_worker or add nodes"
    )


def test_a_ray_started_here_counts_the_cpus_of_the_affinity_mask() -> None:
    script = (
        "import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])\n"
        "import ray\n"
        "from patterning_dist.runtime.environment import ray_session\n"
        "with ray_session(1): print(ray.cluster_resources()['CPU'])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["1.0"], done.stderr
