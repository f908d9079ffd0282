"""The entry points for `ray job submit`: each is its command of `patterning`, options, errors and exit codes alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOBS = ("pattern", "sample", "solve", "retrain")


def job(name: str, *arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"COLUMNS": "100"} | environment,
        timeout=60,
    )


@pytest.mark.parametrize("name", JOBS)
def test_help_is_that_of_the_stage(name: str, tmp_path: Path) -> None:
    result = job(name, "--help", folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"Usage: {name}.py [OPTIONS]" in result.stdout
    wanted = {
        "pattern": "Run every stage",
        "sample": "posterior chains",
        "solve": "sample weights",
        "retrain": "every arm",
    }
    assert wanted[name] in result.stdout
    assert "--run-dir" in result.stdout and "--set" in result.stdout


def test_a_bad_experiment_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: bad\nsampling: {number_of_draws: 3}\n")
    result = job("pattern", "bad.yaml", "--run-dir", "there", folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: bad.yaml: ")
    assert "sampling.number_of_draws is not a known key; did you mean sampling.num_draws?" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "there").exists()
    for flag in (["--config", "bad.yaml"], ["--config=bad.yaml"]):
        named = job("pattern", *flag, "--run-dir", "there", folder=tmp_path)
        assert (named.returncode, named.stderr) == (2, result.stderr)
    missing = job("pattern", "none.yaml", folder=tmp_path)
    assert missing.returncode == 2
    assert missing.stderr.splitlines() == [
        "error: none.yaml: cannot be read (No such file or directory); give an experiment file"
    ]


def test_one_stage_alone_needs_those_before_it(tmp_path: Path) -> None:
    experiment = ROOT / "configs" / "quickstart.yaml"
    result = job("solve", str(experiment), "--run-dir", "there", folder=ROOT)
    assert result.returncode == 2
    assert result.stderr.startswith("error: there: stage solve needs stage prepare, which is not done")


def test_a_submitted_job_is_told_to_keep_its_run_elsewhere(tmp_path: Path) -> None:
    submitted = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    assert job("pattern", "none.yaml", folder=tmp_path, **submitted).stderr.startswith("note: without --run-dir")
    for given in (["--run-dir", "there"], ["--run-dir=there"]):
        assert job("pattern", "none.yaml", *given, folder=tmp_path, **submitted).stderr.startswith("error: ")
