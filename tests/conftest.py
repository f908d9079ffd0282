"""What tests of several folders share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Before torch is imported: tests are small, and threads that wait for each other only cost time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's workers yield to everything else of the machine by default, and tests wait for them with deadlines.
os.environ.setdefault("RAY_worker_niceness", "0")
# How often Ray Train asks how its workers are: trainings of tests last for seconds.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")


# Tests of these folders start a Ray each, which takes what cores there are.
CLUSTERS = {"end_to_end", "fault", "golden", "gpu", "ray"}


class OneClusterAtATime(LoadScopeScheduling):
    """With ``-n 2`` one process runs all tests with a Ray, one after another, and the other one those without."""

    def _split_scope(self, nodeid: str) -> str:
        _, folder, file = nodeid.split("::")[0].split("/")
        return "clusters" if folder in CLUSTERS else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneClusterAtATime:
    return OneClusterAtATime(config, log)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with data and a checkpoint; ``tiny_run.copy_run`` copies it for stages to run in."""
    from tiny_run import make_tiny_run

    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Ray on this machine with two CPUs, for all tests of a module."""
    import logging

    import ray

    from patterning_dist.runtime.environment import worker_environment

    with pytest.MonkeyPatch.context() as patch:
        for name, value in worker_environment(1).items():
            patch.setenv(name, value)
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # observables of the tests' own
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init("local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        yield
        ray.shutdown()
