"""The files of cluster/: well-formed, agreeing with each other and with the versions tested; no cluster is started."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml
from dockerfile_parse import DockerfileParser
from kuberay_fields import RAY_JOB
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli, start

from patterning_dist.cli import app

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHERS = ("ray-cluster-on-premise.yaml", "ray-cluster-aws.yaml")
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")
JOB = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
PODS = {
    group["template"]["spec"]["containers"][0]["name"]: group
    for group in (JOB["spec"]["rayClusterSpec"]["headGroupSpec"], *JOB["spec"]["rayClusterSpec"]["workerGroupSpecs"])
}
# What `ray job stop` and Kubernetes must give a run, which leaves within 30 s of SIGTERM.
SECONDS_TO_LEAVE = 40


def pinned(package: str) -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))


def launcher(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_file_is_what_ray_expects(name: str) -> None:
    config = launcher(name)
    validate_config(prepare_config(config))  # as `ray up` does it
    with pytest.raises(jsonschema.ValidationError, match="setup_command"):
        validate_config(prepare_config(config | {"setup_command": []}))
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    assert f"RAY_JOB_STOP_WAIT_TIME_S={SECONDS_TO_LEAVE}" in head
    for command in (head, worker):
        assert "RAY_AUTH_MODE=token" in command
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
        options = {option for parameter in start.params for option in parameter.opts}
        assert {word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")} <= options


def test_on_premise_all_workers_are_started() -> None:
    config = launcher("ray-cluster-on-premise.yaml")
    (workers,) = prepare_config(config)["available_node_types"].values()
    assert workers["min_workers"] == len(config["provider"]["worker_ips"])


def test_on_aws_only_workers_are_on_spot_machines_and_the_token_is_where_ray_looks() -> None:
    config = launcher("ray-cluster-aws.yaml")
    spot = {
        name: node["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        for name, node in config["available_node_types"].items()
    }
    assert spot == {config["head_node_type"]: None, "workers": "spot"}
    assert config["available_node_types"]["workers"]["max_workers"] == config["max_workers"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "--run-dir s3://" in (CLUSTER / "ray-cluster-aws.yaml").read_text()


def test_the_ray_job_has_fields_of_kuberay_only() -> None:
    jsonschema.Draft202012Validator(RAY_JOB).validate(JOB)
    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        jsonschema.validate(JOB | {"spec": JOB["spec"] | {"backofLimit": 1}}, RAY_JOB)
    options = {option for parameter in start.params for option in parameter.opts}
    for group in PODS.values():
        assert {f"--{name}" for name in group["rayStartParams"]} <= options


@pytest.mark.parametrize("name", PODS)
def test_the_pods_are_valid_and_have_time_to_leave(name: str) -> None:
    template = PODS[name]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    spec = template["spec"]
    assert spec["terminationGracePeriodSeconds"] >= SECONDS_TO_LEAVE
    assert spec["restartPolicy"] == "Never"
    assert spec["securityContext"]["runAsNonRoot"] is True
    (container,) = spec["containers"]
    assert {"name": "metrics", "containerPort": int(PODS[name]["rayStartParams"]["metrics-export-port"])} in container[
        "ports"
    ]


def test_the_ray_job_keeps_its_run_on_the_shared_claim() -> None:
    cluster = JOB["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == pinned("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    assert JOB["spec"]["backoffLimit"] > 0
    pods = [group["template"]["spec"] for group in PODS.values()]
    assert len({pod["containers"][0]["image"] for pod in pods}) == 1
    command = shlex.split(JOB["spec"]["entrypoint"])
    run_dir = Path(command[command.index("--run-dir") + 1])
    for pod in pods:
        (mount,) = pod["containers"][0]["volumeMounts"]
        assert Path(mount["mountPath"]) in run_dir.parents
        assert mount["name"] == pod["volumes"][0]["name"]
        assert "persistentVolumeClaim" in pod["volumes"][0]
    config = Path(command[2]).relative_to("/opt/patterning")
    assert (ROOT / config).exists() and "WORKDIR /opt/patterning" in (CLUSTER / "Dockerfile").read_text()


def test_the_hook_tells_the_driver_to_leave_and_waits_for_it(tmp_path: Path) -> None:
    (container,) = PODS["ray-head"]["template"]["spec"]["containers"]
    shell, option, command = container["lifecycle"]["preStop"]["exec"]["command"]
    # Of this test's own run only: others may be running on this machine.
    here = command.replace("bin/[p]atterning run", f"{tmp_path}/bin/[p]atterning run")
    assert here.count(str(tmp_path)) == 2
    assert subprocess.run([shell, option, here], check=False, timeout=30).returncode == 0  # nothing runs

    program = tmp_path / "bin" / "patterning"
    program.parent.mkdir()
    leaving = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1.5), sys.exit(143)))"
    program.write_text(f"import signal, sys, time\n{leaving}\nprint('up', flush=True)\ntime.sleep(60)\n")
    driver = subprocess.Popen([sys.executable, program, "run", "x.yaml"], stdout=subprocess.PIPE)
    try:
        assert driver.stdout is not None and driver.stdout.readline() == b"up\n"
        hook = subprocess.Popen([shell, option, here])
        assert driver.wait(timeout=30) == 143  # reaped, as the driver's parent does it
        assert hook.wait(timeout=30) == 0
    finally:
        driver.kill()
        driver.stdout.close()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_pinned_runs_as_nobody_special_and_holds_no_secret(name: str, tmp_path: Path) -> None:
    content = (CLUSTER / name).read_text()
    steps = DockerfileParser(path=str(tmp_path))  # reads and writes a file of its own
    steps.content = content
    order = [step["instruction"] for step in steps.structure if step["instruction"] != "COMMENT"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", steps.baseimage)
    assert [step["value"] for step in steps.structure if step["instruction"] == "USER"] == ["1000"]
    assert order[-2:] == ["USER", "CMD"] and "HEALTHCHECK" not in order and "ADD" not in order
    copies = [step["value"] for step in steps.structure if step["instruction"] == "COPY"]
    assert copies == ["pyproject.toml constraints.txt ./", ". ."]  # the large layer survives a change of the code
    installs = [step["value"] for step in steps.structure if "pip install" in step["value"]]
    assert "-c constraints.txt" in installs[0] and "--no-deps" in installs[1]
    names = [*steps.envs, *(step["value"] for step in steps.structure if step["instruction"] == "ARG")]
    assert not [x for x in names if re.search("token|secret|password|key", x, re.IGNORECASE)]
    assert f"docker build -f cluster/{name} " in content


def test_little_is_sent_to_docker() -> None:
    lines = [x for x in (ROOT / ".dockerignore").read_text().splitlines() if x and not x.startswith("#")]
    assert lines[0] == "*"
    sent = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert all((ROOT / name).exists() for name in sent)
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "patterning_dist", "configs"} <= set(sent)
    assert lines.index("corpora/large") > lines.index("!corpora")


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Subcommands of ``patterning`` and ``ray`` that a file names where a command stands: indented, quoted or run."""
    pattern = (
        r"(?:`|    |&& |bin/|exec |0\.1\.0(?:-cpu)? |token |entrypoint: |RAY_\S+=\S+ )(patterning|ray) ([a-z][a-z-]*)"
    )
    for match in re.finditer(pattern, text):
        yield match[1], match[2]


def test_every_command_named_exists() -> None:
    known = {"patterning": set(typer.main.get_command(app).commands), "ray": set(cli.commands)}
    named = {found for file in sorted(CLUSTER.iterdir()) for found in commands(file.read_text())}
    assert {("patterning", "run"), ("patterning", "submit"), ("patterning", "doctor"), ("ray", "up")} <= named
    assert not [(program, command) for program, command in named if command not in known[program]]
