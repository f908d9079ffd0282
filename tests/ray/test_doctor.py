"""The doctor finds nothing wrong where all is well, and what is wrong where something is."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from typer.testing import CliRunner

from patterning_dist.cli import app
from patterning_dist.runtime.doctor import Finding, machine, run_doctor
from patterning_dist.runtime.doctor.cluster import bounded, check_address
from patterning_dist.runtime.doctor.disk import check_location

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def actors_alive() -> set[str]:
    return {name for name, actor in ray._private.state.actors().items() if actor["State"] != "DEAD"}


@pytest.fixture(scope="module")
def before(local_ray: None) -> set[str]:
    """Actors that other tests have left on this cluster: Ray Data's own outlive their driver."""
    return actors_alive()


@pytest.fixture(scope="module")
def findings(before: set[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finding]:
    location = tmp_path_factory.mktemp("runs")
    shown: list[Finding] = []
    found = run_doctor(location / "new", None, shown.append)
    assert found == shown
    assert list(location.iterdir()) == []  # what it wrote, it removed
    return {finding.check: finding for finding in found}


def test_everything_is_looked_at_and_works(findings: dict[str, Finding]) -> None:
    of_the_machine = {"python", "packages", "cores", "memory", "gpus", "shared memory", "ports", "network"}
    assert findings.keys() >= of_the_machine | {"disk", "locks", "ray", "dashboard", "deepspeed", "gloo"}
    broken = [finding for finding in findings.values() if finding.state == "broken"]
    assert broken == []


def test_self_tests_report_what_they_measured(findings: dict[str, Finding]) -> None:
    assert "1 node, 2 CPUs, 0 GPUs" in findings["ray"].text
    assert "two steps on cpu, loss" in findings["deepspeed"].text
    assert "sums over 2 processes, one node are right" in findings["gloo"].text and "MB/s" in findings["gloo"].text
    assert findings["dashboard"].text.startswith("off")


def test_no_processes_are_left(findings: dict[str, Finding], before: set[str]) -> None:
    deadline = time.monotonic() + 30
    while alive := actors_alive() - before:
        assert time.monotonic() < deadline, alive
        time.sleep(0.5)


def test_wrong_versions_are_named() -> None:
    found = machine.check_packages(["torch>=99", "numpy>=1", "no-such-package>=3"])
    assert found.state == "broken"
    assert "torch is " in found.text and "wanted >=99" in found.text
    assert "no-such-package is not installed, wanted >=3" in found.text and "numpy" not in found.text


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = machine.check_ports([port])
    assert found.state == "warning" and found.text.startswith(f"{port} in use")
    assert machine.check_ports([port]).state == "ok"


def test_too_little_shared_memory_is_said(small_disk: Path) -> None:
    found = machine.check_shared_memory(small_disk)
    assert found.state == "warning" and "--shm-size" in found.text
    assert machine.check_shared_memory(small_disk / "missing").state == "warning"


def test_a_full_disk_is_said(small_disk: Path) -> None:
    disk, locks = check_location(small_disk / "runs")
    assert disk.state == "broken" and "No space left on device" in disk.text and "--run-dir" in disk.text
    assert locks.state == "ok"
    assert list(small_disk.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said() -> None:
    (found,) = check_location(Path("/proc/runs"))
    assert found.state == "broken" and "/proc cannot be written" in found.text and "--run-dir" in found.text


def test_a_cluster_that_is_not_there_is_one_line_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert check_address(address) is None
    result = CliRunner().invoke(app, ["doctor", "--run-dir", str(tmp_path), "--address", address])
    assert result.exit_code == 1
    assert f"nothing answers at {address}" in result.stdout.splitlines()[-1]


def test_waiting_is_bounded(local_ray: None) -> None:
    @ray.remote(num_cpus=0)
    def sleep() -> None:
        time.sleep(60)

    task = sleep.remote()
    found = bounded("gloo", lambda: ray.get(task, timeout=0.2))
    ray.cancel(task, force=True)
    assert found.state == "broken" and "no answer within" in found.text


def test_a_worker_that_fails_is_reported(local_ray: None) -> None:
    @ray.remote(num_cpus=0)
    def die() -> None:
        os._exit(1)

    found = bounded("deepspeed", lambda: ray.get(die.options(max_retries=0).remote()))
    assert found.state == "broken" and found.text.startswith("a worker failed")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
