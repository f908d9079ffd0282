"""A full disk ends a run in order; some space takes it on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import failures
import pytest
from failures import events, long_run, pushes, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    with failures.cluster_of(2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster, tiny_run, tmp_path_factory):
    _, run = long_run(tiny_run, tmp_path_factory.mktemp("undisturbed") / "run")
    failures.finish(failures.start_driver(run, cluster), run)
    return failures.results(run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_some_space_takes_it_on(cluster, undisturbed, tiny_run, small_disk):
    _, run = long_run(tiny_run, small_disk / "run")
    driver = failures.start_driver(run, cluster)
    wait_for("progress", lambda: pushes(run) > 15)
    with open(small_disk / "ballast", "wb") as ballast, pytest.raises(OSError, match="No space"):
        while True:
            ballast.write(bytes(1 << 20))
            ballast.flush()
    assert driver.wait(timeout=120) == 2
    log = (small_disk / "run.log").read_text()
    (small_disk / "ballast").unlink()
    # The log lies on the full disk as well: what the driver wanted to say may be cut off.
    assert "Traceback" not in log
    reached = pushes(run)
    assert reached > 15
    failures.finish(failures.start_driver(run, cluster), run)
    assert events(run, "unit_resumed")
    failures.assert_same(failures.results(run), undisturbed)
