"""The cluster that processes are killed on, and the run that nothing happens to: one of each for all modules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import failures
import numpy as np
import pytest
from ray.cluster_utils import Cluster
from shared_ray import joined
from tiny_run import quiet

from patterning_dist.stages.sample import sample


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    """A head and two nodes; a test that takes a node away brings another."""
    with failures.cluster_of(2) as cluster:
        yield cluster


@pytest.fixture(scope="package")
def undisturbed(cluster: Cluster, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """All numbers of a long run whose processes live until its end."""
    config, run = failures.long_run(tiny_run, tmp_path_factory.mktemp("undisturbed") / "run")
    with joined(cluster.address):
        sample(config, run, quiet())
    assert not failures.events(run, "chain_lost")
    found = failures.results(run)
    assert not any(len(value) for name, value in found.items() if name.endswith("/excluded"))
    assert len(found) > 60
    return found
