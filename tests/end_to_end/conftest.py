"""What tests of the whole loop share."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from whole_run import command, events


@pytest.fixture(scope="session")
def finished(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped by Ctrl-C while it sampled, and then run again by the same command."""
    directory = tmp_path_factory.mktemp("pipeline") / "run"
    config = tiny_run / "config.yaml"
    first = subprocess.Popen(command("run", config, directory), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while ("sample", "started") not in events(directory) and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGINT)
    _, complaint = first.communicate(timeout=120)
    assert first.returncode == 130, complaint
    assert "run the same command to resume" in complaint
    second = subprocess.run(command("run", config, directory), capture_output=True, text=True, timeout=400)
    assert second.returncode == 0, second.stderr
    return directory
