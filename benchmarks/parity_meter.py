"""What both halves of parity_devinterp.py measure about themselves; the standard library only."""

from __future__ import annotations

import re
import time
from pathlib import Path


class Meter:
    """While it is entered: wall seconds, and CPU seconds of all threads, of this process."""

    def __enter__(self) -> Meter:
        self._started = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._started[0]
        self.cpu = time.process_time() - self._started[1]


def memory(entry: str) -> float:
    """VmRSS (now) or VmHWM (the peak, which the kernel keeps) of this process, in MB."""
    return int(re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000


def disk(folder: Path) -> dict[str, int]:
    """Bytes and number of the files below a folder."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return {"bytes": sum(sizes), "files": len(sizes)}
