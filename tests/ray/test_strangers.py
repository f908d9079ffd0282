"""A Ray that a run starts on this machine works for its owner, and for nobody else who reaches a port of it."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

# As a command does: the variables first, then everything that imports ray.
HOST = """
from patterning_dist.runtime.local_token import guard_local_ray
guard_local_ray()
import json, os, sys
import psutil, ray
from patterning_dist.runtime.environment import ray_session

@ray.remote(num_cpus=0)
class Actor:
    def one(self):
        return 1

with ray_session(1):
    actor = Actor.remote()
    ray.get(actor.one.remote())
    own = psutil.Process()
    ports = {
        (process.name(), connection.laddr.ip, connection.laddr.port)
        for process in (own, *own.children(recursive=True))
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    context = ray.get_runtime_context()
    found = {"ports": sorted(ports), "address": context.gcs_address, "token": os.environ["RAY_AUTH_TOKEN"]}
    found["session"] = ray._private.worker.global_worker.node.get_session_dir_path()
    print(json.dumps(found), flush=True)
    sys.stdin.read()
"""
GUEST = """
import sys
import ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(ray.get(ray.remote(num_cpus=0)(lambda: 6 * 7).remote()))
"""
# Calls by which the state of a cluster is read, and code is run: of the head, raylets, workers, and their agents.
CALLS = (
    "NodeInfoGcsService/GetAllNodeInfo",
    "NodeManagerService/RequestWorkerLease",
    "ObjectManagerService/Push",
    "CoreWorkerService/PushTask",
    "JobInfoGcsService/GetAllJobInfo",
    "ReporterService/CpuProfiling",
)
# Another service has this port, or something else than gRPC.
NOT_SERVED = {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE}


def environment(home: Path) -> dict[str, str]:
    """Of a user who has no token."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(home)}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    env = environment(tmp_path_factory.mktemp("owner")) | {"RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", HOST]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.communicate(timeout=60)


def join(host: dict[str, Any], home: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", GUEST, host["address"]]
    return subprocess.run(command, env=environment(home) | changes, capture_output=True, text=True, timeout=200)


def test_the_owner_gets_in(host: dict[str, Any], tmp_path: Path) -> None:
    owner = join(host, tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=host["token"])
    assert (owner.returncode, owner.stdout) == (0, "42\n"), owner.stderr


@pytest.mark.parametrize("changes", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}])
def test_a_stranger_does_not(host: dict[str, Any], tmp_path: Path, changes: dict[str, str]) -> None:
    stranger = join(host, tmp_path, **changes)
    assert stranger.returncode != 0 and stranger.stdout == ""
    assert "InvalidAuthToken" in stranger.stderr


def test_no_port_answers_a_stranger(host: dict[str, Any]) -> None:
    asked: set[str] = set()
    for name, ip, port in host["ports"]:
        at = "127.0.0.1" if ip in ("::", "0.0.0.0") else ip
        codes = {call: rpc(f"{at}:{port}", call) for call in CALLS}
        assert set(codes.values()) <= NOT_SERVED | {grpc.StatusCode.UNAUTHENTICATED}, (name, port, codes)
        asked |= {call for call, code in codes.items() if code is grpc.StatusCode.UNAUTHENTICATED}
        # Metrics are for whoever collects them, as on any cluster; nothing else is.
        for path in ("/", "/api/jobs/", "/api/actors", "/get_runtime_envs_info", "/logs"):
            status, content = web(f"http://{at}:{port}{path}")
            is_metrics = status == 200 and content.startswith(b"# HELP ")
            assert is_metrics or status in (None, 401, 403, 404, 405), (name, port, path, content)
    assert asked == set(CALLS), "each of these is served somewhere"


def rpc(address: str, call: str) -> grpc.StatusCode:
    """What becomes of a call with an empty request."""
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(f"/ray.rpc.{call}")(b"", timeout=10)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def web(url: str) -> tuple[int | None, bytes]:
    """Status and beginning of the answer; None where HTTP is not spoken."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read(100)
    except urllib.error.HTTPError as error:
        return error.code, b""
    except (OSError, http.client.HTTPException):
        return None, b""


def test_the_token_is_in_no_file(host: dict[str, Any]) -> None:
    files = [file for file in Path(host["session"]).rglob("*") if file.is_file()]
    assert files
    assert not [str(file) for file in files if host["token"].encode() in file.read_bytes()]
