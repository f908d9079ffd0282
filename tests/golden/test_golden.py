"""Golden numbers: chi, weights and metrics of a tiny run of every kind are those of the files in this folder.

Those of the whole loop, for every kind of task, are compared in `end_to_end/test_matrix.py`, which has the runs.

That a run equals a repetition of itself does not show a change of all numbers; these files do. They are changed on
purpose only, by `pytest tests/golden tests/end_to_end/test_matrix.py --golden-update`, and CHANGELOG.md says why.

How a processor's last bits are told from a real change. Another processor, or another version of a kernel, adds in
another order: float32 is off by some 6e-8 of a value at every step, n dependent steps by about sqrt(n) of that times
what their dynamics multiply, and chi, a covariance of small differences of losses, by the ratio of a loss to its
fluctuation more. The runs are short, so that this stays far below TOLERANCE, and one per cent of one setting far above
(`test_a_real_change_is_seen`); both are relative to the root mean square of an array. Whether the bits are the same as
well is said at the end of the session, and asserted nowhere.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from golden import runs
from golden.compare import TOLERANCE, Compare, stored
from golden.digest import deviation, digest

pytestmark = [pytest.mark.slow]


@pytest.mark.parametrize("kind", ["causal_lm", "own_model"])
def test_numbers_are_those_of_before(kind: str, local_ray: None, tmp_path: Path, golden: Compare) -> None:
    golden(kind, getattr(runs, kind)(tmp_path))


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
