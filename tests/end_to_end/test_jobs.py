"""The entry points for `ray job submit`: each is its command of `patterning`, options, errors and exit codes alike."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
JOBS = ("pattern", "sample", "solve", "retrain")


class Job(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Job]:
    """Runs a script as its own process would, in this one."""

    def run(name: str, *arguments: str, folder: Path, **environment: str) -> Job:
        script = ROOT / "jobs" / f"{name}.py"
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "argv", [str(script), *arguments])
            patch.syspath_prepend(str(script.parent))
            for key, value in ({"COLUMNS": "100"} | environment).items():
                patch.setenv(key, value)
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(script), run_name="__main__")
        return Job(ended.value.code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("name", JOBS)
def test_help_is_that_of_the_stage(job: Callable[..., Job], name: str, tmp_path: Path) -> None:
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


def test_a_bad_experiment_is_one_line_and_exit_code_2(job: Callable[..., Job], tmp_path: Path) -> None:
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


def test_one_stage_alone_needs_those_before_it(job: Callable[..., Job], tmp_path: Path) -> None:
    experiment = ROOT / "configs" / "quickstart.yaml"
    result = job("solve", str(experiment), "--run-dir", "there", folder=ROOT)
    assert result.returncode == 2
    assert result.stderr.startswith("error: there: stage solve needs stage prepare, which is not done")


def test_a_submitted_job_is_told_to_keep_its_run_elsewhere(job: Callable[..., Job], tmp_path: Path) -> None:
    submitted = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    assert job("pattern", "none.yaml", folder=tmp_path, **submitted).stderr.startswith("note: without --run-dir")
    for given in (["--run-dir", "there"], ["--run-dir=there"]):
        assert job("pattern", "none.yaml", *given, folder=tmp_path, **submitted).stderr.startswith("error: ")


def test_it_runs_as_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "solve.py"), "--config", "none.yaml", "--run-dir", "there"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: none.yaml: cannot be read") and len(done.stderr.splitlines()) == 1
