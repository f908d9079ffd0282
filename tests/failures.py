"""Real failures: a Ray cluster of several raylets on this machine, drivers on it, and the processes that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from shared_ray import start_cluster
from tiny_run import copy_run, edge, finish_inputs, tiny_config

from patterning_dist.aggregation.files import read_chains, read_gradients, read_records, read_traces
from patterning_dist.config import Config, dump_config
from patterning_dist.storage.run import RunDirectory
from patterning_dist.storage.store import LocalStorage

# Long enough that a kill which waits for files finds the run under way; chains are never given up, but where a test
# says so.
LONG = (
    "sampling.num_draws=320",
    "sampling.aggregator_shards=2",
    "sampling.snapshot_seconds=0.2",
    "sampling.max_chain_failures=1000",
)
# A dead node is noticed after 3 s instead of 15 s or more.
_HEALTH_CHECKS = {"health_check_period_ms": 500, "health_check_failure_threshold": 6, "health_check_timeout_ms": 20_000}
_PATIENCE = 240.0  # seconds for anything that a test waits for


@contextmanager
def cluster_of(num_nodes: int) -> Iterator[Cluster]:
    """A head without CPUs, and nodes with one CPU each; processes on them find the modules of the tests."""
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        cluster = start_cluster(patch, Path(folder), num_cpus=0, _system_config=_HEALTH_CHECKS)
        try:
            for _ in range(num_nodes):
                cluster.add_node(num_cpus=1)
            yield cluster
        finally:
            cluster.shutdown()


def actors(cluster: Cluster, kind: str) -> list[int]:
    """Process ids of the actors of a class on this cluster, and on no other of this machine."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()}
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            # The command may hold blanks and brackets: what follows the last bracket is the state and the parent.
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (entry / "cmdline").read_bytes()
        except OSError:  # gone meanwhile
            continue
        if int(parent) in raylets and state != "Z" and command.startswith(f"ray::{kind}".encode()):
            found.append(int(entry.name))
    return sorted(found)


def kill(pid: int) -> None:
    """As the kernel does for want of memory; an error if the process is not there, for then nothing was tested."""
    os.kill(pid, signal.SIGKILL)


def wait_for(what: str, condition: Callable[[], Any], running: Future | None = None) -> Any:
    """The first true value of a condition; an error if it takes long, or if what brings it about is over."""
    deadline = time.monotonic() + _PATIENCE
    while not (value := condition()):
        if running is not None and running.done():
            running.result()
            raise AssertionError(f"the run was over before {what}")
        assert time.monotonic() < deadline, f"{what} did not happen within {_PATIENCE:g} s"
        time.sleep(0.05)
    return value


def long_run(source: Path, target: Path, *overrides: str) -> tuple[Config, RunDirectory]:
    """A copy of a tiny run that is about to sample long chains, by this process or by a driver of its own."""
    run = copy_run(source, target)
    config = tiny_config(source, *LONG, *overrides)
    (run.path / "config.yaml").write_text(dump_config(config))
    finish_inputs(config, run)
    return config, run


def start_driver(run: RunDirectory, cluster: Cluster) -> subprocess.Popen:
    """``patterning sample`` in a process of its own; what it says is appended to driver.log."""
    with open(run.path.parent / f"{run.path.name}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "patterning_dist", "sample", str(run.path)],
            env=os.environ | {"RAY_ADDRESS": cluster.address},
            stdout=log,
            stderr=log,
            # Tests in the background of a shell ignore Ctrl-C, and would hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def finish(driver: subprocess.Popen, run: RunDirectory) -> None:
    """Wait until a driver is through, and has succeeded."""
    code = driver.wait(timeout=_PATIENCE)
    assert code == 0, (run.path.parent / f"{run.path.name}.log").read_text()[-3000:]


def events(run: RunDirectory, kind: str) -> list[dict[str, Any]]:
    """What the run has to say of one kind."""
    file = run.path / "events.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def snapshots(run: RunDirectory, part: str) -> dict[str, list[int]]:
    """Numbers of the snapshots of a part (shard-0, checkpoints) of all subjects, by what they are of."""
    found: dict[str, list[int]] = {}
    for file in (run.path / "sampling").rglob(f"{part}/chain-*"):
        of, number, _ = file.name.split(".")
        found.setdefault(f"{file.parent.parent.name}/{of}", []).append(int(number))
    return found


def pushes(run: RunDirectory) -> int:
    """Durable pushes of all chains, on the first shard."""
    return sum(max(numbers) for numbers in snapshots(run, "shard-0").values())


def middle(run: RunDirectory, least: int = 3) -> dict[str, list[int]]:
    """Chains with a checkpoint after ``least`` pushes or more: they are under way, with something to go on from."""
    return {name: numbers for name, numbers in snapshots(run, "checkpoints").items() if max(numbers) >= least}


@contextmanager
def beside(function: Callable[..., Any], *arguments: Any) -> Iterator[Callable[..., Any]]:
    """Runs a function in a thread, to be disturbed by the body; it must be at it when the body ends, and come through.

    Yields ``wait_for`` for the body.

    Raises:
        Exception: what the function raised.
    """
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(function, *arguments)
        try:
            yield partial(wait_for, running=running)
            assert not running.done(), "the run was over before all kills had happened"
        except BaseException:
            ray.shutdown()  # the thread would go on for long
            raise
        running.result(_PATIENCE)


class HoldingStorage(LocalStorage):
    """Holds one shard at a place inside ``push``, as long as it lives: when the file ``hold-<place>`` is there.

    Places: ``write``, the push is taken in and neither durable nor answered; ``delete``, durable and not answered.
    """

    def write(self, name: str, content: bytes) -> None:
        self._hold("write", name)
        super().write(name, content)

    def delete(self, name: str) -> None:
        self._hold("delete", name)
        super().delete(name)

    def held(self, place: str) -> int | None:
        """The process that is being held."""
        file = self.root / f"held-{place}"
        return int(file.read_text()) if file.exists() and file.read_text() else None

    def _hold(self, place: str, name: str) -> None:
        if "/shard-" not in name:
            return
        try:
            (self.root / f"hold-{place}").unlink()  # by one process only
        except FileNotFoundError:
            return
        (self.root / f"held-{place}").write_text(str(os.getpid()))
        time.sleep(_PATIENCE)


def deadly_edge(model: torch.nn.Module) -> torch.Tensor:
    """The same, but the process dies wherever it lies above ``set_edge``: at the same draw of a chain every time."""
    value = edge(model)
    if value > float((Path(os.environ["TESTS_FOLDER"]) / "edge").read_text()):
        kill(os.getpid())
    return value


def set_edge(threshold: float) -> None:
    """For ``deadly_edge`` on the cluster of this process."""
    (Path(os.environ["TESTS_FOLDER"]) / "edge").write_text(str(threshold))


def results(run: RunDirectory) -> dict[str, np.ndarray]:
    """All numbers that sampling leaves, by name."""
    found: dict[str, np.ndarray] = {}
    for path in sorted((run.path / "response").rglob("*.parquet")):
        if path.parent.suffix != ".parquet":  # a part of a table
            table = pq.read_table(path)
            found |= {f"{path.name}/{name}": table[name].to_numpy() for name in table.column_names}
    folders = sorted(file.parent for file in (run.path / "sampling").rglob("chains.json"))
    for folder in folders:
        name, (chains, excluded) = str(folder.relative_to(run.path)), read_chains(folder)
        found[f"{name}/excluded"] = np.array(sorted(excluded), int)
        for chain in chains:
            found |= {f"{name}/{chain.chain}/{key}": value for key, value in chain.state_dict().items()}
        numbers = [chain.chain for chain in chains]
        found |= {f"{name}/traces/{key}": value for key, value in read_traces(folder, numbers).items()}
        found[f"{name}/draws"] = np.array([(record.draws, record.steps) for record in read_records(folder)])
        if (folder / "gradients").exists():
            subject = str(folder.relative_to(run.path / "sampling"))
            found[f"{name}/gradients"] = read_gradients(LocalStorage(run.path), subject, numbers)
    return found


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 0.0) -> None:
    """Equal bit for bit, or to a relative tolerance."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if tolerance == 0 or value.dtype.kind not in "fc":
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        else:
            scale = np.abs(value).max(initial=0)
            np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance * scale, err_msg=name)
