"""An experiment of the user's own, in a folder of its own: the whole loop by its name, and a stage that it adds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(folder: Path) -> str:
    command = [sys.executable, "-m", "patterning_dist", "run", "examples/two_features.yaml", "--run-dir", "run"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONPATH")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def test_the_weights_decide_which_feature_is_relied_on(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    for name in ("two_features.py", "two_features.yaml"):
        shutil.copy(EXAMPLES / name, tmp_path / "examples")
    run(tmp_path)
    follows_first = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert follows_first["plus"] > 0.9
    assert follows_first["minus"] < 0.1
    assert 0.1 < follows_first["base"] < 0.9
    assert abs(follows_first["permuted"] - follows_first["base"]) < 0.4
    assert (tmp_path / "run" / "report.html").exists()
    again = run(tmp_path)
    assert "verdict: done before, inputs unchanged" in again
    assert "retrain: done before, inputs unchanged" in again


def test_it_is_as_short_as_it_is_said_to_be() -> None:
    lines = [len((EXAMPLES / f"two_features.{kind}").read_text().splitlines()) for kind in ("py", "yaml")]
    assert sum(lines) <= 100
