"""Arrays of a run held against the golden file of its kind, or written there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from golden.digest import deviation, digest

FOLDER = Path(__file__).parent
TOLERANCE = 1e-4  # of the root mean square of an array: `test_golden` says why
# What is a difference of nearly equal float32 losses: central differences over the pool, and gaps. With AVX2 instead of
# AVX-512 most move by up to 6e-4 and those of an arm of llama by 3.8e-3, which is 2e-6 nats of losses near 3.6; all
# else moves by less than 1e-4.
OF_DIFFERENCES = 5e-3
Compare = Callable[[str, dict[str, np.ndarray]], None]


def stored(kind: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{kind}.json").read_text())


def write(kind: str, arrays: dict[str, np.ndarray]) -> None:
    lines = ",\n".join(f'"{name}": {json.dumps(digest(array))}' for name, array in arrays.items())
    (FOLDER / f"{kind}.json").write_text(f"{{\n{lines}\n}}\n")


def tolerance(name: str) -> float:
    return OF_DIFFERENCES if name.startswith("chi/pool/") or name.endswith("_gap") else TOLERANCE


def compare(kind: str, arrays: dict[str, np.ndarray]) -> str:
    """How near the arrays are, in a line.

    Raises:
        AssertionError: one of them is another, or only on one side.
    """
    golden, found = stored(kind), {name: digest(array) for name, array in arrays.items()}
    sizes = {
        name: deviation(golden[name], found[name]) if name in golden and name in found else np.inf
        for name in golden | found
    }
    same = sum(name in found and found[name]["sha256"] == entry["sha256"] for name, entry in golden.items())
    largest = max(sizes, key=lambda name: sizes[name] / tolerance(name))
    moved = {name: size for name, size in sizes.items() if not size <= tolerance(name)}
    assert not moved, f"{kind}: relative to the rms of each array: {moved}"
    return f"{kind}: {same} of {len(golden)} arrays equal bit for bit; {largest} moves most, by {sizes[largest]:.2g}"
