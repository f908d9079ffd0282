"""Checks of the Ray cluster: a worker on every node, its versions, DeepSpeed, and the network between nodes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from patterning_dist.config.deepspeed import deepspeed_config
from patterning_dist.errors import last_line
from patterning_dist.runtime.doctor.machine import Finding
from patterning_dist.runtime.probe.ranks import probe_groups
from patterning_dist.runtime.resources import Node, Resources, nodes
from patterning_dist.runtime.training.engine import initialize

_TIMEOUT = 90.0
_PACKAGES = ("ray", "torch", "patterning-dist")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NUM_FLOATS, _REPEATS = 4_000_000, 3  # 16 MB
_SMALL_SKEW = 1.0  # seconds


def check_address(address: str) -> Finding | None:
    """Whether anything listens at ``host:port``; None where it does, or where Ray itself knows the location."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        return Finding(
            "ray", "broken", f"nothing answers at {address} ({error}): is the head node up, and the port open to here?"
        )
    return None


def check_cluster() -> Iterator[Finding]:
    """All checks of the cluster that this process has joined, one after another."""
    cluster = nodes()
    yield _check_nodes(cluster)
    yield _check_dashboard()
    on_gpu = [node for node in cluster if node.total.get("GPU", 0) >= 1]
    yield bounded("deepspeed", lambda: _check_deepspeed((on_gpu or cluster)[0], "cuda" if on_gpu else "cpu"))
    # Two processes of one node still use the network interface that several nodes would.
    places = cluster if len(cluster) > 1 else cluster * 2
    yield bounded("gloo", lambda: _check_all_reduce("gloo", places, "cpu"))
    if on_gpu:
        yield bounded("nccl", lambda: _check_all_reduce("nccl", on_gpu, "cuda"))


def bounded(check: str, run: Callable[[], Finding]) -> Finding:
    """The finding of a check, or what kept it from one."""
    try:
        return run()
    except ray.exceptions.GetTimeoutError:
        return Finding(
            check,
            "broken",
            f"no answer within {_TIMEOUT:g} s: the processes did not start or do not reach each other; free CPUs and "
            "GPUs, open the ports between the nodes, or name the interface with GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME",
        )
    except ray.exceptions.RayError as error:
        return Finding(check, "broken", f"a worker failed ({last_line(error)}): see its log in the Ray session folder")


def _on(node: Node, device: str = "cpu") -> dict[str, Any]:
    """Ray options of a process on one node; on the CPU it takes none, so that a busy cluster can be looked at."""
    there = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return {"scheduling_strategy": there} | Resources("a check", 0, int(device == "cuda")).options


@ray.remote
def _describe() -> tuple[dict[str, str], float]:
    """Versions on a node, and the time of its clock."""
    return _versions(), time.time()


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def _skew(node: Node) -> float:
    """Seconds by which the clock of a node is off for certain: the answer is from some time during the call."""
    before = time.time()
    _, there = ray.get(_describe.options(**_on(node)).remote(), timeout=_TIMEOUT)
    return max(before - there, there - time.time(), 0.0)


def _check_nodes(cluster: list[Node]) -> Finding:
    answers, silent, skew = {}, [], 0.0
    calls = {node.id: _describe.options(**_on(node)).remote() for node in cluster}
    deadline = time.monotonic() + _TIMEOUT
    for node in cluster:
        try:
            answers[node.name], _ = ray.get(calls[node.id], timeout=max(deadline - time.monotonic(), 1))
            skew = max(skew, _skew(node))
        except ray.exceptions.GetTimeoutError:
            silent.append(
                f"{node.name}: no answer within {_TIMEOUT:g} s, its processes do not start or are not reached"
            )
        except ray.exceptions.RayError as error:
            silent.append(f"{node.name}: {last_line(error)}; is this package installed there?")
    own = _versions()
    different = [
        f"{name} has {what} {answer[what]}, here it is {version}"
        for name, answer in answers.items()
        for what, version in own.items()
        if answer[what] != version
    ]
    if silent or different:
        remedy = ": install the same versions on all nodes" if different else ""
        return Finding("ray", "broken", "; ".join(silent + different) + remedy)
    cpus, gpus = (sum(node.total.get(kind, 0) for node in cluster) for kind in ("CPU", "GPU"))
    text = f"{len(cluster)} node{'s' if len(cluster) > 1 else ''}, {cpus:g} CPUs, {gpus:g} GPUs"
    text += ", the same versions on all" if len(cluster) > 1 else f", Ray {own['ray']}"
    if skew > _SMALL_SKEW:
        text += f"; clocks differ by {skew:.3g} s, which runs do not mind"
    return Finding("ray", "ok", text)


def _check_dashboard() -> Finding:
    """Whoever reaches the dashboard can run code on the cluster, unless a token is asked for."""
    address = ray._private.worker.get_dashboard_url()
    has_token = os.environ.get("RAY_AUTH_MODE") == "token"
    tokens = f"token authentication {'on' if has_token else 'off'}"
    if not address:
        return Finding("dashboard", "ok", f"off; {tokens}")
    host = address.rpartition(":")[0]
    if host in _LOOPBACK or has_token:
        return Finding("dashboard", "ok", f"at {address}; {tokens}")
    return Finding(
        "dashboard",
        "warning",
        f"at {address} without token authentication: whoever reaches it can run code; start Ray with "
        "RAY_AUTH_MODE=token, or --dashboard-host 127.0.0.1",
    )


def _check_deepspeed(node: Node, device: str) -> Finding:
    with probe_groups([[_on(node, device)]], device, 1, _TIMEOUT) as (group,):
        before, after = ray.get(group.begin(_two_steps), timeout=_TIMEOUT)[0]
    if not after < before:
        return Finding(
            "deepspeed", "broken", f"two steps took the loss from {before:.3g} to {after:.3g}: reinstall deepspeed"
        )
    version = importlib.metadata.version("deepspeed")
    return Finding("deepspeed", "ok", f"{version}: two steps on {device}, loss {before:.3g} to {after:.3g}")


def _two_steps(rank: Any) -> tuple[float, float]:
    """The loss of a small regression before and after two optimizer steps."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1).to(rank.device)
    inputs = torch.randn(16, 8, device=rank.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine = initialize(model, optimizer, deepspeed_config(None, 16, rank.ranks.size), rank.device)
    losses = []
    for _ in range(3):
        loss = (engine(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def _check_all_reduce(check: str, places: list[Node], device: str) -> Finding:
    with probe_groups([[_on(node, device) for node in places]], device, 1, _TIMEOUT) as (group,):
        answers = ray.get(group.begin(_all_reduce), timeout=_TIMEOUT)
    expected = len(places) * (len(places) + 1) / 2
    wrong = [rank for rank, (value, _) in enumerate(answers) if value != expected]
    if wrong:
        return Finding(
            check,
            "broken",
            f"the sum over {len(places)} processes is wrong on ranks {wrong}: change the versions of torch",
        )
    speed = min(speed for _, speed in answers)
    where = f"{len(places)} nodes" if len({node.id for node in places}) > 1 else f"{len(places)} processes, one node"
    return Finding(check, "ok", f"sums over {where} are right; {speed / 1e6:,.0f} MB/s for 16 MB")


def _all_reduce(rank: Any) -> tuple[float, float]:
    """The sum of rank + 1 over all ranks, and bytes a second of a large tensor."""
    values = torch.full((_NUM_FLOATS,), rank.ranks.rank + 1.0, device=rank.device)
    seconds = []
    for _ in range(_REPEATS):
        values.fill_(rank.ranks.rank + 1.0)
        started = time.perf_counter()
        torch.distributed.all_reduce(values)
        smallest, largest = values.min().item(), values.max().item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return smallest if smallest == largest else float(np.nan), values.numel() * values.element_size() / min(seconds)
