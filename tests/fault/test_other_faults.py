"""Faults of what a run is written to: a full disk, damaged files, a clock that jumps. Nothing is lost in silence."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import failures
import pytest
from failures import events, long_run, middle, pushes, wait_for
from shared_ray import joined
from tiny_run import quiet

from patterning_dist.aggregation.files import read_chains
from patterning_dist.errors import PatterningError
from patterning_dist.stages.sample import sample

pytestmark = [pytest.mark.slow, pytest.mark.extended]


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
    assert events(run, "subject_resumed")
    failures.assert_same(failures.results(run), undisturbed)


def test_damaged_snapshots_and_checkpoints_are_said_and_not_used(cluster, undisturbed, tiny_run, tmp_path):
    _, run = long_run(tiny_run, tmp_path / "run")
    driver = failures.start_driver(run, cluster)
    wait_for("progress", lambda: pushes(run) > 15 and middle(run))
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=30) == 143
    rng = random.Random(0)
    sampling = run.path / "sampling"
    torn, *flipped = sorted(sampling.glob("*/shard-1/chain-*"))[:2]
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    checkpoint = max(sampling.glob("*/checkpoints/chain-*"))
    for file in (*flipped, checkpoint):
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    failures.finish(failures.start_driver(run, cluster), run)
    said = " ".join(event["message"] for event in events(run, "damaged"))
    for file in (torn, *flipped):
        assert f"{file.name} is damaged" in said
    failures.assert_same(failures.results(run), undisturbed)


def test_a_finished_file_that_is_damaged_is_an_error_that_names_it(undisturbed, cluster, tiny_run, tmp_path):
    _, run = long_run(tiny_run, tmp_path / "run", "sampling.num_draws=20")
    failures.finish(failures.start_driver(run, cluster), run)
    folder = run.path / "sampling" / "everything"
    file = next((folder / "shard-0").glob("chain-1.*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)
    with pytest.raises(PatterningError, match=rf"shard-0.*{file.name} is damaged.* run the same command again"):
        read_chains(folder)
    table = next((run.path / "data").glob("train.parquet"))
    table.write_bytes(table.read_bytes()[: table.stat().st_size // 2])
    driver = failures.start_driver(run, cluster)
    assert driver.wait(timeout=60) == 2
    log = (tmp_path / "run.log").read_text().splitlines()
    assert "needs stage prepare, which is not done" in log[-1]


def test_a_clock_that_jumps_changes_nothing(cluster, undisturbed, tiny_run, tmp_path, monkeypatch):
    config, run = long_run(tiny_run, tmp_path / "run")
    real, jumps = time.time, random.Random(1)
    with joined(cluster.address):
        monkeypatch.setattr(time, "time", lambda: real() + jumps.uniform(-1e6, 1e6))  # of the driver, days either way
        sample(config, run, quiet())
    failures.assert_same(failures.results(run), undisturbed)
