"""Checks of this machine: versions, cores, memory, GPUs, shared memory, the network to itself."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from patterning_dist.runtime.environment import usable_cores

PACKAGE = "patterning-dist"
# What `ray start --head` listens on by default: control store, dashboard, client.
RAY_PORTS = (6379, 8265, 10001)
_COMMAND_TIMEOUT = 20.0
_SOCKET_TIMEOUT = 5.0
_LITTLE_MEMORY = 4e9
_LITTLE_SHARED_MEMORY = 1e9
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
        check: what was looked at.
        state: ``ok``; ``warning``: runs work, but something should be known; ``broken``: runs will fail.
        text: what is there and, unless it is ok, what to do.
    """

    check: str
    state: Literal["ok", "warning", "broken"]
    text: str


def check_python() -> Finding:
    """This Python against the floor of the package."""
    wanted, there = importlib.metadata.metadata(PACKAGE)["Requires-Python"], platform.python_version()
    if there in SpecifierSet(wanted):
        return Finding("python", "ok", f"{there}; wanted {wanted}")
    return Finding("python", "broken", f"{there}; wanted {wanted}: make the environment with such a Python")


def check_packages(requirements: Iterable[str] | None = None) -> Finding:
    """Installed packages against their floors.

    Args:
        requirements: as in pyproject.toml; default: those of the installed package, without its extras.
    """
    wanted = [Requirement(text) for text in requirements or importlib.metadata.requires(PACKAGE) or ()]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    faults, found = [], {}
    for one in wanted:
        try:
            found[one.name] = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            faults.append(f"{one.name} is not installed, wanted {one.specifier or 'any version'}")
            continue
        if not one.specifier.contains(found[one.name], prereleases=True):
            faults.append(f"{one.name} is {found[one.name]}, wanted {one.specifier}")
    if faults:
        return Finding("packages", "broken", f"{'; '.join(faults)}: `pip install -c constraints.txt -e .`")
    main = ", ".join(f"{name} {found[name]}" for name in ("torch", "ray", "deepspeed") if name in found)
    return Finding("packages", "ok", f"{main}; {len(wanted)} requirements are met")


def check_cores() -> Finding:
    """Cores that this process can keep busy, of those of the machine."""
    there, usable = os.cpu_count() or 1, usable_cores()
    if usable < there:
        return Finding(
            "cores",
            "ok",
            f"{usable} of {there} may be used (affinity, control groups); a Ray of your own needs --num-cpus={usable}",
        )
    return Finding("cores", "ok", f"{there}")


def check_memory() -> Finding:
    """Memory that is free, here and in the container."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return Finding("memory", "ok", "unknown: this system has no /proc/meminfo")
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    text = f"{free / 1e9:.3g} GB free"
    limit = _number(_CGROUP / "memory.max")
    if limit is not None:
        text += f", the container may use {limit / 1e9:.3g} GB"
        free = min(free, limit)
    if free < _LITTLE_MEMORY:
        return Finding("memory", "warning", f"{text}: a worker takes 0.5 to 1 GB before its model; start fewer of them")
    return Finding("memory", "ok", text)


def check_gpus() -> Finding:
    """GPUs as torch sees them and as the driver does."""
    driver = _driver()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        free = [torch.cuda.mem_get_info(i)[0] / 1e9 for i in range(len(names))]
        each = ", ".join(f"{name} ({amount:.3g} GB free)" for name, amount in zip(names, free, strict=True))
        return Finding("gpus", "ok", f"{each}; CUDA {torch.version.cuda}, driver {driver or 'unknown'}")
    if driver is not None:
        build = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build without CUDA"
        return Finding(
            "gpus",
            "broken",
            f"there is driver {driver}, but torch {torch.__version__} {build} and sees no GPU: install the build of "
            "torch for this driver, or look at CUDA_VISIBLE_DEVICES",
        )
    return Finding("gpus", "ok", "none: CPU runs")


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Room for Ray's object store, which wants 30 % of the memory and can do with less."""
    if not folder.is_dir():
        return Finding("shared memory", "warning", f"{folder} is not there: Ray puts its objects on disk, slowly")
    free = shutil.disk_usage(folder).free
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{free / 1e9:.3g} GB free in {folder}"
    if free < min(_LITTLE_SHARED_MEMORY, 0.3 * memory):
        return Finding(
            "shared memory",
            "warning",
            f"{text}: Ray falls back to the disk; enlarge it, in a container with --shm-size or a memory volume",
        )
    return Finding("shared memory", "ok", text)


def check_network() -> Finding:
    """Whether processes of this machine reach each other by its own name, as gloo has it."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        return Finding(
            "network",
            "broken",
            f"the host's own name {name} has no address ({error}): gloo and Ray need one; add it to /etc/hosts",
        )
    for target in ("127.0.0.1", address):
        try:
            with socket.create_server((target, 0)) as server:
                socket.create_connection(server.getsockname()[:2], timeout=_SOCKET_TIMEOUT).close()
        except OSError as error:
            return Finding(
                "network",
                "broken",
                f"no connection to this host at {target} ({error}): processes cannot find each other; look at "
                "/etc/hosts and the firewall, or name an interface with GLOO_SOCKET_IFNAME",
            )
    return Finding("network", "ok", f"{name} is reached at {address}")


def check_ports(ports: Iterable[int] = RAY_PORTS) -> Finding:
    """Ports that ``ray start --head`` would take; an embedded Ray takes free ones."""
    taken = []
    for port in ports:
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            taken.append(port)
    if taken:
        names = ", ".join(map(str, taken))
        return Finding(
            "ports",
            "warning",
            f"{names} in use, by a Ray that runs already or by others: join it with --address, or give `ray start` "
            "--port, --dashboard-port, --ray-client-server-port of your own",
        )
    return Finding("ports", "ok", f"{', '.join(map(str, ports))} are free")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(result.stdout.strip().splitlines()), None)
