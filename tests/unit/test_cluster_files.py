"""The files of cluster/: well-formed, agreeing with each other and with the versions tested; nothing is started."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "cluster" / "slurm.sh"


def pinned(package: str) -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))


def test_the_launcher_file_is_what_ray_expects() -> None:
    config = yaml.safe_load((ROOT / "cluster" / "ray-cluster.yaml").read_text())
    prepared = prepare_config(config)  # as `ray up` does it
    validate_config(prepared)
    (workers,) = prepared["available_node_types"].values()
    assert workers["min_workers"] == len(config["provider"]["worker_ips"])
    with pytest.raises(jsonschema.ValidationError, match="setup_command"):
        validate_config(prepare_config(config | {"setup_command": []}))
    start = config["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start
    for command in (start, config["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in command
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0


def test_the_ray_job_keeps_its_run_on_the_shared_claim() -> None:
    job = yaml.safe_load((ROOT / "cluster" / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == pinned("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    assert len({pod["containers"][0]["image"] for pod in pods}) == 1
    command = shlex.split(job["spec"]["entrypoint"])
    run_dir = Path(command[command.index("--run-dir") + 1])
    for pod in pods:
        (mount,) = pod["containers"][0]["volumeMounts"]
        assert Path(mount["mountPath"]) in run_dir.parents
        assert mount["name"] == pod["volumes"][0]["name"]
        assert "persistentVolumeClaim" in pod["volumes"][0]


def test_the_slurm_script_parses_and_says_how_it_is_used() -> None:
    assert subprocess.run(["bash", "-n", SLURM], check=False).returncode == 0
    result = subprocess.run(["bash", SLURM], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (
        2,
        "usage: sbatch cluster/slurm.sh CONFIG --run-dir DIR [--set KEY=VALUE]\n",
    )


def test_the_slurm_script_runs_one_command_with_a_token_of_its_own(tmp_path: Path) -> None:
    stubs = {
        "bin/scontrol": "printf 'node7\\nnode8\\n'",
        "bin/srun": 'f="$RAY_AUTH_TOKEN_PATH"; stat -c %a "$f"; wc -c < "$f"; printf "%s\\n" "$RAY_AUTH_MODE" "$@"',
        ".venv/bin/activate": "",
    }
    for name, body in stubs.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)
    result = subprocess.run(
        ["bash", SLURM, "x.yaml", "--run-dir", "there"],
        capture_output=True,
        text=True,
        check=True,
        env={
            "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "5",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_ON_NODE": "16",
        },
    )
    mode, size, auth, *command = result.stdout.splitlines()
    assert (mode, size, auth) == ("600", "64", "token")
    assert command == [
        *("--kill-on-bad-exit=1", "ray", "symmetric-run", "--address", "node7:6379", "--min-nodes", "2"),
        *(
            "--num-cpus",
            "16",
            "--",
            "env",
            "RAY_ADDRESS=node7:6379",
            "patterning",
            "run",
            "x.yaml",
            "--run-dir",
            "there",
        ),
    ]
    assert not list(tmp_path.glob(".ray-token*"))
