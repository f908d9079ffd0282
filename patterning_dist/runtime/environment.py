"""Process settings that every worker of a run shares, and how Ray is started with them."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import ray
import torch

from patterning_dist.errors import PatterningError
from patterning_dist.runtime.spares import SPARES

# Over ``worker_environment``, of ranks that share a model. Layers are put together and dropped again all the time; kept
# by the allocator for the next one instead of given back, they took three times what a rank holds.
RANK_ENVIRONMENT = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"), str(1 << 20))


def worker_environment(num_threads: int) -> dict[str, str]:
    """Environment variables of a worker process.

    Small models spend much of a step in page faults: glibc gives large blocks straight back to the kernel and fetches
    fresh, untouched pages at the next step. The MALLOC_ settings keep them (a quarter of a step on two cores).
    """
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        "MALLOC_TOP_PAD_": str(64 << 20),
        "TOKENIZERS_PARALLELISM": "false",
        # Observables of the user's own lie beside the experiment.
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])),
    }


def prepare_process(num_threads: int) -> None:
    """Set up torch in a worker.

    Denormal numbers are flushed to zero: log-probabilities far below zero make softmax gradients denormal, and those
    cost several times a normal multiplication on the CPU.
    """
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """CPUs that this process can keep busy, at least 1: those of its affinity mask, within its control groups' quotas.

    Args:
        cgroup: where control groups are mounted.
        own: file that names those of this process.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([there, *_core_quotas(cgroup, own)])))


def _core_quotas(cgroup: Path, own: Path) -> Iterator[float]:
    """Quotas [CPUs] of the control groups of this process and of those around them; version 2, and 1."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroup / "cpu" if controllers else cgroup
        # A container sees its own group at the root, whatever the name outside: folders that are missing are passed by.
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                yield from _quota(folder, bool(controllers))


def _quota(group: Path, is_first_version: bool) -> Iterator[float]:
    with contextlib.suppress(OSError, ValueError):  # the root has none; "max" is none
        if is_first_version:
            quota, period = (int((group / f"cpu.cfs_{what}_us").read_text()) for what in ("quota", "period"))
        else:
            quota, period = map(int, (group / "cpu.max").read_text().split())
        if quota > 0:
            yield quota / period


def resolve_device(name: str) -> str:
    """``auto`` -> cuda where there is one, else cpu.

    Raises:
        PatterningError: cuda was asked for and there is none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise PatterningError(
            "device: cuda was asked for, but torch finds no CUDA device; set device=cpu or device=auto"
        )
    return name


@contextlib.contextmanager
def ray_session(num_threads: int) -> Iterator[None]:
    """Join the Ray cluster that RAY_ADDRESS names, or start one on this machine; leave it (or stop it) at the end.

    Workers that a stage is through with stay for the next one until the outermost session ends.
    """
    started = not ray.is_initialized()
    if started:
        _start(num_threads)
    try:
        with SPARES.open():
            yield
    except ray.exceptions.RayTaskError as error:
        raise users_error(error) or error from None
    except ray.exceptions.RayActorError as error:
        raise PatterningError(
            f"a worker process died ({str(error).splitlines()[0]}); look for memory or node failures, and run the same "
            "command again to resume"
        ) from error
    finally:
        if started:
            ray.shutdown()


def _start(num_threads: int) -> None:
    environment = worker_environment(num_threads)
    # An embedded cluster inherits the environment of this process; a running one takes it through the runtime_env.
    os.environ.update({k: v for k, v in environment.items() if k == "PYTHONPATH" or k not in os.environ})
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    is_main = threading.current_thread() is threading.main_thread()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    # When a terminal closes all its processes get this. Those of Ray are still needed to save: they inherit the mask.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        ray.init(
            address=address or "local",  # never a stranger's cluster that happens to run on this machine
            num_cpus=None if address else usable_cores(),  # Ray would count all of the machine
            include_dashboard=None if address else False,
            runtime_env={"env_vars": environment} if address else None,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except Exception as error:  # Ray raises bare ones, with pages of traceback
        what = f"the Ray cluster at {address} could not be joined" if address else "Ray could not be started here"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PatterningError(
            f"{what} ({reason}); `patterning doctor` looks for the cause; run the same command again to resume"
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main:
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put one of its own there, which knows no checkpoints


def users_error(error: BaseException) -> PatterningError | None:
    """The error meant for the user that a worker raised, out of the layer that Ray wraps it in."""
    if type(error) is PatterningError:
        return error
    cause = getattr(error, "cause", None)
    return None if cause is None else users_error(cause)
