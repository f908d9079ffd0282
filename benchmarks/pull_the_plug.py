"""Kill all that a command has started, at random moments, run it again until it ends; compare with a run left alone.

    python benchmarks/pull_the_plug.py runs/whole runs/broken -- patterning run configs/quickstart.yaml

The command is run with ``--run-dir runs/whole`` to its end (unless that was done before), then with ``--run-dir
runs/broken``, with all of its processes killed (SIGKILL) at moments drawn uniformly over the time that the first took.
Every table, weight and statistic of the two runs must be the same bit for bit; times, dates and paths may differ.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq

# What a run says of its own course: not a result.
COURSE = {"seconds"}


def family(process: subprocess.Popen, known: dict[int, float]) -> list[psutil.Process]:
    """All processes that stem from the command, those included whose parents are gone; ``known`` is kept up to date."""
    try:
        found = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        found = []
    known |= {p.pid: p.create_time() for p in found}
    alive = []
    for pid, created in known.items():
        try:
            p = psutil.Process(pid)
            if p.create_time() == created and p.status() != psutil.STATUS_ZOMBIE:
                alive += [p, *p.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    known |= {p.pid: p.create_time() for p in alive}
    return list(dict.fromkeys(alive))


def pull(process: subprocess.Popen, known: dict[int, float]) -> int:
    """Kill the whole family until none of it is left; how many processes that were."""
    killed: set[int] = set()
    while members := family(process, known):
        for member in members:
            killed.add(member.pid)
            try:
                member.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        process.poll()
        time.sleep(0.05)
    process.wait()
    return len(killed)


def run_until(command: list[str], seconds: float | None) -> tuple[int | None, float, int]:
    """Run the command, to its end or for some seconds; exit code (None: killed), time taken, processes killed."""
    started, known = time.monotonic(), {}
    process = subprocess.Popen(command, start_new_session=True)
    while process.poll() is None:
        time.sleep(0.1)
        family(process, known)
        if seconds is not None and time.monotonic() - started > seconds:
            return None, time.monotonic() - started, pull(process, known)
    return process.returncode, time.monotonic() - started, 0


def results(folder: Path) -> dict[str, object]:
    """What must be the same: tables without their columns of time, and digests of weights and statistics."""
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        if file.suffix == ".parquet":
            table = pq.read_table(file)
            found[name] = table.drop_columns([c for c in table.column_names if c in COURSE]).to_pandas()
        elif file.suffix == ".safetensors" or "/gradients/" in name:
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def same(a: object, b: object) -> bool:
    """Whether two results are equal; a NaN, such as the training loss before the first step, is equal to itself."""
    return a.equals(b) if hasattr(a, "equals") else a == b


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("whole", type=Path, help="run directory of the run that is left alone")
    parser.add_argument("broken", type=Path, help="run directory of the other; must not be there")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="what the whole run took, if it is there already")
    parser.add_argument("command", nargs="+", help="after --")
    arguments = parser.parse_args()
    if arguments.broken.exists():
        raise SystemExit(f"{arguments.broken} is there already; delete it or name another folder")
    seconds = arguments.seconds
    if seconds is None:
        code, seconds, _ = run_until([*arguments.command, "--run-dir", str(arguments.whole)], None)
        if code != 0:
            raise SystemExit(f"the undisturbed run ended with exit code {code}")
        print(f"undisturbed: {seconds:.0f} s", flush=True)
    generator, started = random.Random(arguments.seed), time.monotonic()
    # Moments of the undisturbed run's time; what is between two of them is how long each attempt may take.
    moments = sorted(generator.uniform(0, seconds) for _ in range(arguments.kills))
    attempts = [b - a for a, b in zip([0, *moments], moments, strict=False)]
    command = [*arguments.command, "--run-dir", str(arguments.broken)]
    killed = 0
    for number, allowed in enumerate(attempts, 1):
        # Every attempt spends some seconds on starting up, in which nothing of the run itself can be hit.
        allowed = max(allowed, generator.uniform(5, 30))
        code, took, processes = run_until(command, allowed)
        if code is not None:
            print(f"attempt {number}: ended by itself after {took:.0f} s, exit code {code}", flush=True)
            break
        killed += 1
        print(f"attempt {number}: {processes} processes killed after {took:.0f} s", flush=True)
    code, took, _ = run_until(command, None)
    print(f"last attempt: {took:.0f} s, exit code {code}; all of it {time.monotonic() - started:.0f} s, {killed} kills")
    a, b = results(arguments.whole), results(arguments.broken)
    different = [name for name in a.keys() | b.keys() if name not in a or name not in b or not same(a[name], b[name])]
    for name in sorted(different):
        print(f"DIFFERENT: {name}")
    print(f"{len(a)} files compared, {len(different)} different")
    sys.exit(1 if different or code else 0)


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "100")
    main()
