"""Seconds, passes over chi and peak resident memory of a solve: chi in memory, by brackets, against shards on disk.

By brackets is the search that the solver falls back to where Newton's method does not converge, with the largest
strength found from nothing: there is no sample to start from. Every solve is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from patterning_dist.response import columns, solver
from patterning_dist.response.solver import solve_for_effective_sample_share

SHARD = 1 << 20  # columns of a file
SHARE = 0.8
BOUNDS = {"inverse_temperature": 30.0, "weight_min": 0.0, "weight_max": 4.0}


def write_chi(folder: Path, num_rows: int, num_columns: int) -> None:
    """Float32 shards of heavy-tailed scores, Student's t with 4 degrees of freedom, rows of correlation 1/2."""
    for start in range(0, num_columns, SHARD):
        rng = np.random.default_rng([num_rows, start])
        shape = (num_rows, min(SHARD, num_columns - start))
        scores = rng.standard_t(4, size=shape) + rng.standard_t(4, size=(1, shape[1]))
        np.save(folder / f"{start:012d}.npy", scores.astype(np.float32))


def peak_memory() -> float:
    """Largest resident set of this process, MB. Not `ru_maxrss`, which begins with that of the process before it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(folder: Path, way: str) -> dict[str, Any]:
    """One solve, in this process."""
    files = sorted(folder.glob("*.npy"))
    before = peak_memory()
    started = time.perf_counter()
    if way == "brackets":
        columns.SAMPLE = sys.maxsize
        solver.newton = lambda *_: None
    chi = files if way == "disk" else np.concatenate([np.load(file) for file in files], axis=1)
    num_rows = len(np.load(files[0], mmap_mode="r"))
    target = np.where(np.arange(num_rows) % 2, -0.5, 1.0)
    solution = solve_for_effective_sample_share(chi, target, SHARE, **BOUNDS)
    solved = time.perf_counter() - started
    total = sum(float(part.sum()) for part in solution.parts())
    return {
        "seconds": solved,
        "writing": time.perf_counter() - started - solved,
        "passes": solution.num_passes,
        "steps": solution.num_iterations,
        "strength": solution.strength,
        "largest": solution.largest_feasible_strength,
        "residual": solution.residual,
        "mean": total / sum(len(np.load(file, mmap_mode="r")[0]) for file in files),
        "memory": peak_memory() - before,
    }


def main() -> None:
    """Every size and way in turn, a line of the table each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["8x1000000", "8x10000000"], help="rows x columns")
    parser.add_argument("--in-memory", type=int, default=1_000_000, help="columns up to which chi is also held whole")
    parser.add_argument(
        "--folder", type=Path, help="where shards are written and removed again; default: a temporary one"
    )
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(Path(arguments.one[0]), arguments.one[1])))
        return
    print("| rows x columns | chi | s | weights again, s | passes | Newton steps | peak memory, MB | strength |")
    print("| --: | --- | --: | --: | --: | --: | --: | --: |")
    for size in arguments.sizes:
        num_rows, num_columns = map(int, size.split("x"))
        with TemporaryDirectory(dir=arguments.folder) as name:
            write_chi(Path(name), num_rows, num_columns)
            for way in ("brackets", "memory", "disk") if num_columns <= arguments.in_memory else ("disk",):
                command = [sys.executable, __file__, "--one", name, way]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(
                    f"| {num_rows} x {num_columns:,} | {way} | {found['seconds']:.1f} | {found['writing']:.1f} | "
                    f"{found['passes']} | {found['steps']} | {found['memory']:.0f} | {found['strength']:.12g} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
