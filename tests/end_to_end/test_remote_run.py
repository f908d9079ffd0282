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
from whole_run import command, invoke

from patterning_dist.storage.mirror import Location
from patterning_dist.storage.run import read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.extended, pytest.mark.timeout(900)]

STAGES = ("prepare", "train", "sample", "solve", "retrain", "report")
OFTEN = ("sampling.snapshot_seconds=0",)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with s3_server() as url:
        yield url.format("run")


def test_a_run_at_a_url_goes_on_elsewhere_and_is_that_of_a_folder(
    tiny_run: Path, finished: Path, tmp_path: Path, url: str, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def there(machine: str) -> Path:
        """The working copy of a machine."""
        (found,) = (path for path in (tmp_path / machine).iterdir() if path.is_dir())
        return found

    def run(machine: str) -> str:
        monkeypatch.setenv("PATTERNING_CACHE", str(tmp_path / machine))
        result = invoke("run", tiny_run / "config.yaml", url, *OFTEN)
        assert result.exit_code == 0, result.output
        return result.output

    first = subprocess.Popen(
        command("run", tiny_run / "config.yaml", url, *OFTEN),
        env=os.environ | {"PATTERNING_CACHE": str(tmp_path / "first")},
    )
    deadline, storage = time.monotonic() + 300, Location.at(url).storage
    while not storage.names("sampling/everything/shard-0"):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert read_manifest(url)["stages"]["sample"]["status"] != "finished"
    assert "train: done before, inputs unchanged" in run("second")
    stages = read_manifest(url)["stages"]
    assert [stages[name]["status"] for name in STAGES] == ["finished"] * len(STAGES)
    # Another machine again, with nothing of its own: all of it can be had, and nothing is run.
    assert run("third").count("done before, inputs unchanged") == len(STAGES)
    compared = 0
    for file in sorted((finished / "response").rglob("*.parquet")) + sorted((finished / "weights").glob("*.parquet")):
        if file.is_file():
            found, expected = (pq.read_table(root / file.relative_to(finished)) for root in (there("third"), finished))
            assert found.equals(expected), file.name
            compared += 1
    for file in finished.rglob("model.safetensors"):
        assert (there("third") / file.relative_to(finished)).read_bytes() == file.read_bytes()
        compared += 1
    assert compared > 10
