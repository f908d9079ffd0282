"""All checks, from this machine to the whole cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import ray
from rich.console import Console
from rich.text import Text

from patterning_dist.errors import PatterningError
from patterning_dist.runtime.doctor import machine
from patterning_dist.runtime.doctor.cluster import check_address, check_cluster
from patterning_dist.runtime.doctor.disk import check_location
from patterning_dist.runtime.doctor.machine import Finding
from patterning_dist.runtime.environment import ray_session
from patterning_dist.storage.store import path_or_url

_STYLES = {"ok": "green", "warning": "yellow", "broken": "bold red"}


def run_doctor(location: Path | str, address: str | None, show: Callable[[Finding], None]) -> list[Finding]:
    """Look at everything that a run needs, and say what is found as soon as it is.

    Args:
        location: of run directories, a path or a URL; what is written there is removed again.
        address: of a Ray cluster; None: that of RAY_ADDRESS, else one is started here and stopped again.
        show: is handed every finding.
    """
    found: list[Finding] = []
    for finding in _findings(location, address):
        found.append(finding)
        show(finding)
    return found


def print_findings(location: str, address: str | None) -> int:
    """The findings as lines on the terminal; the exit code of the command, 1 if anything is broken."""
    console = Console()

    def show(finding: Finding) -> None:
        line = Text.assemble((f"{finding.state:8}", _STYLES[finding.state]), f"{finding.check:14}{finding.text}")
        console.print(line, soft_wrap=True, highlight=False)

    found = run_doctor(path_or_url(location), address, show)
    return int(any(finding.state == "broken" for finding in found))


def _findings(location: Path | str, address: str | None) -> Iterator[Finding]:
    for check in (
        machine.check_python,
        machine.check_packages,
        machine.check_cores,
        machine.check_memory,
        machine.check_gpus,
        machine.check_shared_memory,
        machine.check_network,
        machine.check_ports,
    ):
        yield check()
    yield from check_location(location)
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
    address = os.environ.get("RAY_ADDRESS")
    if address and (unreachable := check_address(address)):
        yield unreachable
        return
    try:
        with ray_session(1):
            yield from check_cluster()
    except (PatterningError, OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = f"the cluster at {address}" if address else "a Ray of its own"
        yield Finding("ray", "broken", f"{where} could not be used ({' '.join(str(error).split())[:300]})")
