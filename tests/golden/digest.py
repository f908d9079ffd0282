"""What is kept of an array, and how another array is compared with it.

A digest has the shape, the mean, the standard deviation, two projections, and the first and the last entry of an
array, and the sha256 of its values rounded to float32. The projections are onto fixed vectors whose entries look
uniform and independent (multiples of an irrational number modulo one), so that a permutation, a sign or one changed
entry moves them; they are divided by sqrt(n), so that independent errors of the entries move them by as much as one
entry.

Numbers are compared relative to the root mean square of the array. Whole numbers and words are compared exactly.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

# The plastic number's powers: the two-dimensional low-discrepancy sequence with the least known discrepancy
# (Roberts 2018).
_IRRATIONAL = (0.7548776662466927, 0.5698402909980532)
STATISTICS = ("mean", "standard_deviation", "projections", "first", "last")


def digest(array: np.ndarray) -> dict[str, Any]:
    """JSON of an array; see the module. Entries that are NaN are counted and left out."""
    if array.dtype.kind != "f":
        return {"shape": list(array.shape), "kind": "exact", "sha256": _sha256(json.dumps(array.tolist()).encode())}
    values = array.astype(np.float64).ravel()
    missing = np.isnan(values)
    values = np.where(missing, 0.0, values)
    index = np.arange(1, values.size + 1)
    projections = [np.sqrt(12) * ((index * factor) % 1 - 0.5) @ values / np.sqrt(values.size) for factor in _IRRATIONAL]
    return {
        "shape": list(array.shape),
        "kind": "real",
        "missing": int(missing.sum()),
        "rms": _short(np.sqrt(np.mean(values**2))),
        "mean": _short(values.mean()),
        "standard_deviation": _short(values.std()),
        "projections": [_short(value) for value in projections],
        "first": _short(values[0]),
        "last": _short(values[-1]),
        "sha256": _sha256(values.astype(np.float32).tobytes()),
    }


def deviation(stored: dict[str, Any], found: dict[str, Any]) -> float:
    """The largest change of a statistic, relative to the rms of the stored array; infinite where none is allowed."""
    if any(stored.get(key) != found.get(key) for key in ("shape", "kind", "missing")):
        return np.inf
    if stored["kind"] == "exact":
        return 0.0 if stored["sha256"] == found["sha256"] else np.inf
    changes = np.subtract(
        *([value for name in STATISTICS for value in np.atleast_1d(d[name])] for d in (found, stored))
    )
    largest = float(np.abs(changes).max())
    if stored["rms"] == 0:
        return 0.0 if largest == 0 else np.inf
    return largest / stored["rms"]


def _short(value: float) -> float:
    return float(f"{value:.9g}")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
