"""A run over several hosts: what it ends with is what one machine ends with, and what a host's loss does to it.

`make test-hosts`, as root; `make test-all` runs it as well. Skipped with a word where namespaces cannot be made.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from hosts import Host, Network, why_not
from matrix_kinds import RETRAIN, gpt_neox
from shared_ray import S3_ACCESS
from typer.testing import CliRunner

from patterning_dist.cli import app

pytestmark = [pytest.mark.extended, pytest.mark.slow, pytest.mark.timeout(1500)]
PORT = 5000
DRAWS = 80
BUCKET = f"""
from pyarrow import fs
fs.S3FileSystem(scheme="http", endpoint_override="127.0.0.1:{PORT}", allow_bucket_creation=True).create_dir("bucket")
"""
COPY = f"""
import sys
from pyarrow import fs
store = fs.S3FileSystem(scheme="http", endpoint_override="127.0.0.1:{PORT}")
fs.copy_files("bucket/" + sys.argv[1], sys.argv[2], store, fs.LocalFileSystem())
"""
ALIVE = """
import ray
ray.init(log_to_driver=False)
print(*[node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]])
"""


class Cluster:
    """Ray on a head without CPUs and on two hosts with one each; a fourth keeps the runs, and submits them."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.head, self.store = network.host("head"), network.host("store")
        self.store.start("sh", "-c", f"exec moto_server -H 0.0.0.0 -p {PORT} >/tmp/server.log 2>&1")
        eventually(lambda: self.store.run("python", "-c", BUCKET, **S3_ACCESS))
        self.ray(self.head, "--head", "--port=6379", f"--dashboard-host={self.head.address}", "--num-cpus=0")
        self.workers = [self.worker(name) for name in ("anna", "bert")]

    def worker(self, name: str) -> Host:
        """A host more, with an empty disk."""
        host = self.network.host(name)
        self.ray(host, f"--address={self.head.address}:6379", "--num-cpus=1")
        return host

    def ray(self, host: Host, *options: str) -> None:
        """Start a node."""
        given = (f"--node-ip-address={host.address}", "--object-store-memory=100000000")
        host.run("ray", "start", *given, *options, timeout=240, **S3_ACCESS)

    def alive(self) -> set[str]:
        """Addresses of the nodes that Ray counts."""
        found = self.head.run("python", "-c", ALIVE, RAY_ADDRESS=f"{self.head.address}:6379")
        return set(found.splitlines()[-1].split())

    def bring_back(self, host: Host) -> None:
        """Start its node anew if the cluster has given it up meanwhile: Ray takes none back."""
        time.sleep(5)  # in which it finds that out
        if host.address not in self.alive():
            host.run("ray", "stop", "--force")
            self.ray(host, f"--address={self.head.address}:6379", "--num-cpus=1")

    def url(self, name: str) -> str:
        return f"s3://bucket/{name}?scheme=http&endpoint_override={self.store.address}:{PORT}"

    def submit(self, name: str, **sampling: object) -> subprocess.Popen[str]:
        """`patterning submit` on the host that keeps the runs; the experiment and its corpus lie there."""
        inside = Path("/tmp") / name
        self.store.path(inside).mkdir()
        file = experiment(self.store.path(inside), "corpus", **sampling)
        address = f"http://{self.head.address}:8265"
        command = ("patterning", "submit", file.name, "--address", address, "--run-dir", self.url(name))
        return self.store.start(*command, folder=inside, **S3_ACCESS)

    def read(self, name: str) -> Path:
        """A copy of a run's files, for this machine to look at."""
        inside = Path("/tmp") / f"copy-{name}"
        self.store.path(inside).mkdir()
        self.store.run("python", "-c", COPY, name, str(inside), **S3_ACCESS)
        return self.store.path(inside)


def eventually(action: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            action()
            return
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    network = Network()
    try:
        yield Cluster(network)
    finally:
        network.close()


def experiment(folder: Path, sources: str, **sampling: object) -> Path:
    """The whole loop of a GPT-NeoX, every model over two ranks, with its corpus in a folder; the file.

    Args:
        folder: for both.
        sources: the corpus, as the file names it.
        sampling: keys to change.
    """
    content = gpt_neox(folder)
    if sampling:  # a run of more draws: a check would be four times as long
        del content["check"]
    content["sampling"] |= {"ranks_per_chain": 2, "snapshot_seconds": 1} | sampling
    content |= {"training": content["training"] | {"num_workers": 2}, "retrain": RETRAIN | {"num_workers": 2}}
    content["data"] |= {"sources": [{"path": sources}]}
    (folder / "loop.yaml").write_text(yaml.safe_dump(content))
    return folder / "loop.yaml"


def reference(folder: Path, **sampling: object) -> Path:
    """The run of one machine."""
    file = experiment(folder, str(folder / "corpus"), **sampling)
    done = CliRunner().invoke(app, ["run", str(file), "--run-dir", str(folder / "run")])
    assert done.exit_code == 0, done.output
    return folder / "run"


def assert_same_numbers(found: Path, expected: Path) -> None:
    """chi, weights and what came of them, to the bit."""
    patterns = ("response/susceptibility-*.parquet", "weights/plus.parquet", "retrain/*/seed-0/metrics.parquet")
    tables = [path.relative_to(expected) for pattern in patterns for path in expected.glob(pattern)]
    assert len(tables) > 5
    for table in tables:
        read = (pq.read_table(run / table).to_pandas() for run in (found, expected))
        there, here = (frame.drop(columns="seconds", errors="ignore") for frame in read)
        pd.testing.assert_frame_equal(there, here, check_exact=True, obj=str(table))


def test_two_hosts_end_with_the_numbers_of_one(cluster: Cluster, local_ray: None, tmp_path: Path) -> None:
    submitted = cluster.submit("whole")
    output, _ = submitted.communicate(timeout=900)
    assert submitted.returncode == 0, output
    assert "are spread over nodes" in output
    assert "waiting for a worker" not in output, "nobody else has the room"
    assert_same_numbers(cluster.read("whole"), reference(tmp_path))


def test_a_cable_is_pulled_and_a_host_lost(cluster: Cluster, local_ray: None, tmp_path: Path) -> None:
    """One comes back after 20 s, another takes the place of the one that is lost, with an empty disk."""
    submitted = cluster.submit("disturbed", num_draws=DRAWS)
    assert submitted.stdout is not None
    sampled(submitted, share=0.2)
    anna, bert = cluster.workers
    with anna.unplugged():
        time.sleep(20)
    cluster.bring_back(anna)
    sampled(submitted, share=0.6)
    bert.lose()
    cluster.workers[1] = cluster.worker("carl")
    output, _ = submitted.communicate(timeout=900)
    assert submitted.returncode == 0, output
    run = cluster.read("disturbed")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event for event in events if event["kind"] == "chain_lost"]
    assert_same_numbers(run, reference(tmp_path, num_draws=DRAWS))


def sampled(submitted: subprocess.Popen[str], share: float) -> None:
    """Read what a run says, until so much of all draws is taken."""
    assert submitted.stdout is not None
    for line in submitted.stdout:
        found = re.match(r"sampling the posterior: ([\d,]+) of ([\d,]+)", line)
        if found and int(found[1].replace(",", "")) >= share * int(found[2].replace(",", "")):
            return
    raise AssertionError("the run ended before")
