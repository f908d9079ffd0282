"""A signal to the driver, then the same command again: what was done is kept, and the numbers are the undisturbed ones.

Ctrl-C is in ``test_study``.
"""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from whole_run import command, events, invoke

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("local_ray")]


def leave(tiny_run: Path, directory: Path, stage: str, sent: signal.Signals) -> tuple[int, str]:
    """A driver in a process of its own that gets a signal in a stage: exit code, and what it said."""
    driver = subprocess.Popen(command("run", tiny_run / "config.yaml", directory), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while (stage, "started") not in events(directory) and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.05)
    driver.send_signal(sent)
    _, said = driver.communicate(timeout=120)
    return driver.returncode, said


@pytest.mark.parametrize("stage", [pytest.param("train", marks=pytest.mark.extended), "sample"])
def test_the_folder_is_made_again_under_a_run(tiny_run: Path, tmp_path: Path, stage: str) -> None:
    """It stops within seconds, and neither it nor a worker of its writes into the new one."""
    directory = tmp_path / "run"
    driver = subprocess.Popen(command("run", tiny_run / "config.yaml", directory), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not list((directory / {"train": "baseline", "sample": "sampling"}[stage]).glob("*")):
        time.sleep(0.05)
        assert time.monotonic() < deadline and driver.poll() is None
    directory.rename(tmp_path / "before")  # at once, as it is for whoever writes there
    directory.mkdir()
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 2, said
    assert said.count("error:") == 1 and "Traceback" not in said
    assert f"error: {directory}: was removed, or made again, under the run" in " ".join(said.split())
    time.sleep(2)  # what its workers may still be at
    assert list(directory.iterdir()) == []


def test_told_to_leave_then_killed_then_finished(tiny_run: Path, finished: Path, tmp_path: Path) -> None:
    code, said = leave(tiny_run, tmp_path, "train", signal.SIGTERM)
    assert code == 143 and "run the same command to resume" in said, said
    code, _ = leave(tiny_run, tmp_path, "sample", signal.SIGKILL)
    assert code == -signal.SIGKILL
    result = invoke("run", tiny_run / "config.yaml", tmp_path)
    assert result.exit_code == 0, result.output
    found = events(tmp_path)
    assert [found.count((stage, "started")) for stage in ("prepare", "train", "sample")] == [1, 2, 2]
    assert [found.count((stage, "interrupted")) for stage in ("train", "sample")] == [1, 0]
    assert [found.count((stage, "kept")) for stage in ("prepare", "train")] == [2, 1]
    assert found[-1] == ("report", "finished")
    for file in sorted((finished / "response").rglob("*.parquet")) + sorted((finished / "weights").glob("*.parquet")):
        if file.is_file():
            table, expected = (pq.read_table(root / file.relative_to(finished)) for root in (tmp_path, finished))
            for name in expected.column_names:
                np.testing.assert_array_equal(table[name].to_numpy(), expected[name].to_numpy(), err_msg=file.name)
    for file in finished.rglob("model.safetensors"):
        assert (tmp_path / file.relative_to(finished)).read_bytes() == file.read_bytes()
