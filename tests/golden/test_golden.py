"""Golden numbers: chi, weights and metrics of a tiny run of every kind are those of the files in this folder.

That a run equals a repetition of itself does not show a change of all numbers; these files do. They are changed on
purpose only, by `pytest tests/golden --golden-update`, and CHANGELOG.md says why.

How a processor's last bits are told from a real change. Another processor, or another version of a kernel, adds in
another order: float32 is off by some 6e-8 of a value at every step, n dependent steps by about sqrt(n) of that times
what their dynamics multiply, and chi, a covariance of small differences of losses, by the ratio of a loss to its
fluctuation more. The runs are short, so that this stays far below TOLERANCE, and one per cent of one setting far above
(`test_a_real_change_is_seen`); both are relative to the root mean square of an array. Whether the bits are the same as
well is said at the end of the session, and asserted nowhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden import runs
from golden.conftest import SAME_BITS
from golden.digest import deviation, digest

pytestmark = [pytest.mark.slow]

FOLDER = Path(__file__).parent
KINDS = ("language", "causal_lm", "own_model", "brackets")
TOLERANCE = 1e-4


def stored(kind: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{kind}.json").read_text())


def deviations(golden: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """Of every array that either has; infinite where only one of them has it."""
    return {
        name: deviation(golden[name], found[name]) if name in golden and name in found else np.inf
        for name in golden | found
    }


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_before(kind: str, local_ray: None, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    found = {name: digest(array) for name, array in getattr(runs, kind)(tmp_path).items()}
    if pytestconfig.getoption("--golden-update", default=False):
        lines = ",\n".join(f'"{name}": {json.dumps(entry)}' for name, entry in found.items())
        (FOLDER / f"{kind}.json").write_text(f"{{\n{lines}\n}}\n")
        return
    golden = stored(kind)
    same = sum(entry["sha256"] == found.get(name, entry | {"sha256": ""})["sha256"] for name, entry in golden.items())
    pytestconfig.stash[SAME_BITS][kind] = (same, len(golden))
    moved = {name: size for name, size in deviations(golden, found).items() if not size <= TOLERANCE}
    assert not moved, f"{kind}: relative to the rms of each array: {moved}"


@pytest.mark.parametrize("change", ["sampling.inverse_temperature=80.8", "seed=12", "sampling.step_size=2.02e-3"])
def test_a_real_change_is_seen(change: str, local_ray: None, tmp_path: Path) -> None:
    """One per cent of a setting, or another seed, moves every chi by much more than the tolerance."""
    found = {name: digest(array) for name, array in runs.own_model(tmp_path, change).items()}
    golden = stored("own_model")
    moved = {name: deviation(golden[name], found[name]) for name in golden if "/chi_" in name}
    assert min(moved.values()) > 10 * TOLERANCE, moved


def test_signs_orders_and_single_entries_are_seen() -> None:
    array = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    golden = digest(array)
    assert deviation(golden, digest(array)) == 0
    assert deviation(golden, digest(array * np.float32(1 + 1e-6))) < TOLERANCE
    one, swapped = array.copy(), array.copy()
    one[250] += 0.1
    swapped[[100, 101]] = swapped[[101, 100]]
    for changed in (-array, array[::-1], array * 1.001, one, swapped, array[:-1]):
        assert deviation(golden, digest(changed)) > 2 * TOLERANCE
    assert deviation(digest(np.arange(5)), digest(np.arange(5) + (np.arange(5) == 3))) == np.inf
