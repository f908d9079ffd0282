"""Hosts on this machine: namespaces with an address, a name, processes and folders of their own, joined by a bridge.

A host is one process (``unshare``) that all others of it live under: when that is killed, they are gone at once, as
when a machine loses its power. /tmp, /dev/shm and the home folder are the host's own; programs are shared, read only by
custom. Root is needed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef" * 4
NETWORK = "10.77.0"
_IP = shutil.which("ip") or "/usr/sbin/ip"


def why_not() -> str:
    """What this machine lacks for hosts; empty: nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]:
        return f"no {' and no '.join(missing)} here (packages iproute2, util-linux)"
    made = subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True)
    return "" if made.returncode == 0 else f"namespaces cannot be made: {made.stderr.decode().strip()}"


class Network:
    """A bridge, and the hosts at it."""

    def __init__(self) -> None:
        self.name = f"pd{os.getpid() % 100_000}"
        self.hosts: list[Host] = []
        _run(_IP, "link", "add", self.name, "type", "bridge")
        _run(_IP, "link", "set", self.name, "up")

    def host(self, name: str) -> Host:
        """A host more."""
        self.hosts.append(host := Host(self, name, len(self.hosts) + 1))
        return host

    def close(self) -> None:
        for host in self.hosts:
            host.lose()
        _run(_IP, "link", "del", self.name)


class Host:
    """See the module; ``address`` is what the others reach it by."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.name, self.address, self.cable = name, f"{NETWORK}.{number}", f"{network.name}-{number}"
        self.folder = Path(tempfile.mkdtemp(prefix=f"host-{name}-"))
        self.home = Path("/tmp/home")
        self.path(self.home).mkdir(parents=True)
        self._processes: list[subprocess.Popen[str]] = []
        script = f"mount --bind {self.folder}/tmp /tmp; mount -t tmpfs -o size=600m shm /dev/shm; hostname {name}"
        # A name that leads to loopback, as Debian's own installer writes it.
        (self.folder / "tmp" / "etc-hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        script += "; mount --bind /tmp/etc-hosts /etc/hosts; echo ready; exec sleep infinity"
        spaces = ["--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
        self._init = subprocess.Popen(["unshare", *spaces, "sh", "-ec", script], stdout=subprocess.PIPE, text=True)
        self._processes.append(self._init)
        assert self._init.stdout is not None and self._init.stdout.readline() == "ready\n"
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().split()
        self._spaces = ["nsenter", "-t", children[0], "--net", "--mount", "--uts", "--pid"]
        _run(_IP, "link", "add", self.cable, "type", "veth", "peer", "name", "lan0", "netns", children[0])
        _run(_IP, "link", "set", self.cable, "master", network.name, "up")
        for words in (("link", "set", "lo", "up"), ("link", "set", "lan0", "up"),
                      ("addr", "add", f"{self.address}/24", "dev", "lan0")):  # fmt: skip
            _run(*self._spaces, _IP, *words)

    def start(self, *command: str, folder: Path | str = "/tmp/home", **environment: str) -> subprocess.Popen[str]:
        """A process of this host, in one of its folders, with its output to be read."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        inside = ["env", "-C", str(folder), *command]
        process = subprocess.Popen([*self._spaces, *inside], env=self.environment() | environment, **pipes)
        self._processes.append(process)
        return process

    def run(self, *command: str, timeout: float = 120, **environment: str) -> str:
        """Output of a command of this host.

        Raises:
            RuntimeError: it failed.
        """
        process = self.start(*command, **environment)
        output, _ = process.communicate(timeout=timeout)
        if process.returncode != 0:
            raise RuntimeError(f"{self.name}: {' '.join(command)}: {output}")
        return output

    def environment(self) -> Mapping[str, str]:
        """Of a user of this host."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k not in ("PYTHONPATH", "TMPDIR")}
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
        return clean | auth | {"HOME": str(self.home), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

    def path(self, inside: Path | str) -> Path:
        """Where a path below /tmp of this host lies, seen from outside."""
        return self.folder / "tmp" / Path(inside).relative_to("/tmp")

    @contextlib.contextmanager
    def unplugged(self) -> Iterator[None]:
        """Without its cable."""
        _run(_IP, "link", "set", self.cable, "down")
        try:
            yield
        finally:
            _run(_IP, "link", "set", self.cable, "up")

    def lose(self) -> None:
        """Everything of it at once, its folders as well."""
        self._init.send_signal(signal.SIGKILL)
        while self._processes:
            process = self._processes.pop()
            if process.stdout is not None and not process.stdout.closed:
                process.communicate()
        deadline = time.monotonic() + 10
        while Path(f"/sys/class/net/{self.cable}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)  # the cable goes with the host's network
        shutil.rmtree(self.folder, ignore_errors=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
