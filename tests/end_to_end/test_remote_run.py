"""The whole loop with its run directory in an S3 store: killed in the middle, and gone on with by another machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from s3_server import s3_server
from whole_run import command

from patterning_dist.storage.mirror import Place
from patterning_dist.storage.run import STAGES, read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with s3_server() as url:
        yield url.format("run")


def start(tiny_run: Path, place: str, cache: Path) -> subprocess.Popen:
    """``patterning run``, with a working copy of its own; what it says is appended to <cache>.log."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PATTERNING_CACHE": str(cache)}
    with open(cache.parent / f"{cache.name}.log", "ab") as log:
        return subprocess.Popen(
            command("run", tiny_run / "config.yaml", place, "sampling.snapshot_seconds=0"),
            env=environment,
            stdout=log,
            stderr=log,
        )


def finish(driver: subprocess.Popen, cache: Path) -> None:
    assert driver.wait(timeout=400) == 0, (cache.parent / f"{cache.name}.log").read_text()[-3000:]


def test_a_run_at_a_url_goes_on_elsewhere_and_is_that_of_a_folder(
    tiny_run: Path, finished: Path, tmp_path: Path, url: str
) -> None:
    first = start(tiny_run, url, tmp_path / "first")
    deadline, storage = time.monotonic() + 300, Place.at(url).storage
    while not storage.names("sampling/everything/shard-0"):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert read_manifest(url)["stages"]["sample"]["status"] != "finished"
    finish(start(tiny_run, url, tmp_path / "second"), tmp_path / "second")
    stages = read_manifest(url)["stages"]
    assert [stages[name]["status"] for name in STAGES] == ["finished"] * len(STAGES)
    log = (tmp_path / "second.log").read_text()
    assert "train: done before, inputs unchanged" in log
    # Another machine again, with nothing of its own: all of it can be had, and nothing is run.
    finish(start(tiny_run, url, tmp_path / "third"), tmp_path / "third")
    assert (tmp_path / "third.log").read_text().count("done before, inputs unchanged") == len(STAGES)
    (there,) = (path for path in (tmp_path / "third").iterdir() if path.is_dir())
    compared = 0
    for file in sorted((finished / "response").rglob("*.parquet")) + sorted((finished / "weights").glob("*.parquet")):
        if file.is_file():
            found, expected = (pq.read_table(root / file.relative_to(finished)) for root in (there, finished))
            assert found.equals(expected), file.name
            compared += 1
    for file in finished.rglob("model.safetensors"):
        assert (there / file.relative_to(finished)).read_bytes() == file.read_bytes()
        compared += 1
    assert compared > 10
