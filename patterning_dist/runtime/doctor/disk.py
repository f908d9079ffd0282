"""Checks of the location where runs are kept: room, speed, locks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from patterning_dist.errors import PatterningError
from patterning_dist.runtime.doctor.machine import Finding
from patterning_dist.storage.store import open_storage

_BLOCK, _NUM_BLOCKS = bytes(1 << 20), 32
_LITTLE_ROOM, _SLOW = 5e9, 20e6  # bytes, bytes a second
_MAX_SECONDS = 20.0


def check_location(location: Path | str) -> list[Finding]:
    """Room, speed and locks of a run directory, or whether a URL can be written and read."""
    if isinstance(location, str):
        return [_check_url(location)]
    folder = location.absolute()
    while not folder.is_dir():  # a run makes what is missing
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as inside:
            return [_check_disk(folder, Path(inside)), _check_locks(folder, Path(inside) / "lock")]
    except OSError as error:
        return [
            Finding(
                "disk",
                "broken",
                f"{folder} cannot be written ({error.strerror or error}): make it writable, or choose another location "
                "with --run-dir",
            )
        ]


def _check_disk(folder: Path, inside: Path) -> Finding:
    free, written = shutil.disk_usage(folder).free, 0
    started = time.perf_counter()
    try:
        with open(inside / "speed", "wb") as file:
            while written < len(_BLOCK) * _NUM_BLOCKS and time.perf_counter() - started < _MAX_SECONDS:
                written += file.write(_BLOCK)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        return Finding(
            "disk",
            "broken",
            f"{folder}: {written / 1e6:.3g} MB could be written, then: {error.strerror or error}; free some space, or "
            "choose another location with --run-dir",
        )
    speed = written / (time.perf_counter() - started)
    text = f"{folder}: {free / 1e9:.3g} GB free, {speed / 1e6:.3g} MB/s written and synced"
    if free < _LITTLE_ROOM:
        return Finding("disk", "warning", f"{text}: `patterning plan` says how much a run needs")
    if speed < _SLOW:
        return Finding("disk", "warning", f"{text}: snapshots will hold up the chains; choose a faster location")
    return Finding("disk", "ok", text)


def _check_locks(folder: Path, path: Path) -> Finding:
    """A second driver must be kept out of a run directory: by flock, also over the network."""
    with contextlib.ExitStack() as files:
        first, second = (files.enter_context(open(path, "w")) for _ in range(2))
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Finding(
                "locks", "broken", f"{folder}: no file locks ({error.strerror}): mount it with locks (NFS 4, or lockd)"
            )
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Finding("locks", "ok", f"{folder}: a second driver is kept out")
    return Finding(
        "locks",
        "broken",
        f"{folder}: a lock does not keep others out, so two drivers could write to one run: choose another location "
        "with --run-dir, or a mount that has locks",
    )


def _check_url(url: str) -> Finding:
    name = f"doctor-{os.getpid()}-{time.time_ns()}"
    try:
        storage = open_storage(url)
        written = _timed(lambda: storage.write(name, _BLOCK))
        same = storage.read(name) == _BLOCK
        storage.delete(name)
    except (PatterningError, OSError) as error:
        return Finding("storage", "broken", f"{error}: look at the URL, the endpoint and the credentials")
    if not same:
        return Finding("storage", "broken", f"{url}: what was written is not what is read back; use another location")
    return Finding("storage", "ok", f"{url}: 1 MB written in {written:.2g} s and read back")


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
