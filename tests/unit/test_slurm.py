"""cluster/slurm.sh against stand-ins for Slurm's tools: one command, a private token, and notice handed to the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "cluster" / "slurm.sh"
# What srun stands for: the command after `--` of symmetric-run, as a child, with symmetric-run's exit code.
RUN_IT = 'while [ "$1" != -- ]; do shift; done; shift; "$@"'
DRIVER = """trap 'echo told; exit 143' TERM
echo "driver $*"
if [ "$1" = run ]; then touch started; while :; do sleep 0.1; done; fi"""


def folder_with_stubs(folder: Path, **stubs: str) -> dict[str, str]:
    """Stand-ins on the PATH of a job's folder; the environment that sbatch would give."""
    defaults = {"scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" > queued; fi'}
    for name, body in {**defaults, **stubs}.items():
        file = folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    return {
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "5",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "16",
    }


def test_it_parses_and_says_how_it_is_used() -> None:
    assert subprocess.run(["bash", "-n", SLURM], check=False).returncode == 0
    result = subprocess.run(["bash", SLURM], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (
        2,
        "usage: sbatch cluster/slurm.sh CONFIG --run-dir DIR [--set KEY=VALUE]\n",
    )


def test_it_runs_one_command_with_a_token_of_its_own(tmp_path: Path) -> None:
    show = 'f="$RAY_AUTH_TOKEN_PATH"; stat -c %a "$f" "${f%/*}"; wc -c < "$f"; printf "%s\\n" "$RAY_AUTH_MODE" "$@"'
    environment = folder_with_stubs(tmp_path, srun=show)
    arguments = ["x.yaml", "--run-dir", "there", "--set", "name='a b'"]
    result = subprocess.run(
        ["bash", SLURM, *arguments], capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    mode, folder_mode, size, auth, *command = result.stdout.splitlines()
    assert (mode, folder_mode, size, auth) == ("600", "700", "64", "token")
    start, driver = command[: command.index("--")], command[command.index("--") + 1 :]
    assert start == [
        *("--kill-on-bad-exit=1", "ray", "symmetric-run", "--address", "node7:6379"),
        *("--min-nodes", "2", "--num-cpus", "16"),
    ]
    assert driver[:4] == ["env", "RAY_ADDRESS=node7:6379", "bash", "-c"]
    assert 'exec patterning run "$@"' in driver[4] and driver[6:] == arguments
    assert not list(tmp_path.glob(".patterning*"))


@pytest.mark.parametrize(("state", "queued"), [("RUNNING", True), ("CANCELLED", False)])
def test_notice_reaches_the_run_which_leaves_and_is_queued_again(tmp_path: Path, state: str, queued: bool) -> None:
    environment = folder_with_stubs(tmp_path, srun=RUN_IT, patterning=DRIVER, squeue=f"echo {state}")
    job = subprocess.Popen(
        ["bash", SLURM, "x.yaml", "--run-dir", "there"], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B:TERM does
        output, _ = job.communicate(timeout=60)
    finally:
        job.kill()
    assert output.splitlines() == ["driver run x.yaml --run-dir there", "told"]
    assert job.returncode == 143
    assert (tmp_path / "queued").exists() == queued
    if queued:
        assert (tmp_path / "queued").read_text() == "requeue 5\n"
    assert not list(tmp_path.glob(".patterning*"))


def test_a_run_that_fails_is_not_queued_again(tmp_path: Path) -> None:
    environment = folder_with_stubs(tmp_path, srun=RUN_IT, patterning="exit 2", squeue="echo RUNNING")
    result = subprocess.run(["bash", SLURM, "x.yaml"], check=False, env=environment, timeout=60)
    assert result.returncode == 2
    assert not (tmp_path / "queued").exists()


def test_slurm_is_asked_for_notice_that_is_long_enough() -> None:
    asked = [line.removeprefix("#SBATCH ") for line in SLURM.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert "--requeue" in asked and "--signal=B:TERM@60" in asked
