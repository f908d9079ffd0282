"""Ray clusters of the tests' own, and this process as a driver on one of them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from patterning_dist.runtime.environment import worker_environment
from patterning_dist.runtime.spares import SPARES

# Of ``s3_server``, where runs at a URL are kept.
S3_ACCESS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key", "AWS_EC2_METADATA_DISABLED": "true"}


def start_cluster(patch: pytest.MonkeyPatch, folder: Path, **head: object) -> Cluster:
    """A head; while the patch lasts, nodes get the environment of a run's, and find the modules of the tests.

    Args:
        patch: of this process's environment.
        folder: where these modules and the tests leave word for each other, in ``TESTS_FOLDER``.
        head: options of the node.
    """
    patch.setenv("TESTS_FOLDER", str(folder))
    for name, value in worker_environment(1).items():
        patch.setenv(name, value)
    for name, value in S3_ACCESS.items():
        patch.setenv(name, value)
    patch.setenv("PYTHONPATH", str(Path(__file__).parent))
    patch.delenv("RAY_ADDRESS", raising=False)
    return Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **head})


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """This process is a driver on a cluster, and so is what it calls; as a whole, not once more within itself.

    Workers stay from one run to the next.
    """
    if ray.is_initialized():
        assert ray.get_runtime_context().gcs_address == address, "this process is a driver on another cluster"
        yield
        return
    ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    try:
        with SPARES.open():
            yield
    finally:
        ray.shutdown()
