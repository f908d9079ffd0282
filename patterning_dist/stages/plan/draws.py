"""How many draws chi of a wanted standard error takes: from a run, from a calibration, or from an assumption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patterning_dist.measure.measure import DIAGNOSTICS
from patterning_dist.response.cost import ChainCounts
from patterning_dist.stages.calibrate import SETTINGS

# Of an observable with the loss of one token, root mean square over tokens, where nothing has been measured.
_CORRELATION = 0.1


@dataclass(frozen=True)
class Needed:
    """Draws of all chains of a component together.

    Attributes:
        num_draws: for the wanted error, of the observable that needs the most.
        source: where that is known from, in words.
    """

    num_draws: float
    source: str


def needed_draws(error: float, directory: Path, counts: Mapping[str, ChainCounts]) -> Needed:
    """For chi of a standard error: N draws give an error that goes as N^(-1/2).

    A finished run tells by the correlation r of its halves: noise over spread of half of its draws is (1 - r) / r,
    squared. Without a run or a calibration, independent draws of an observable and a loss with correlation r give their
    covariance a relative variance of (1 + r^2) / r^2 a draw.

    Args:
        error: wanted, of chi over its spread across samples.
        directory: of the run.
        counts: subject -> what its chains do.
    """
    found = _of_run(error, directory / DIAGNOSTICS, counts) or _of_calibration(error, directory / SETTINGS)
    each = (1 + _CORRELATION**2) / _CORRELATION**2
    return found or Needed(
        each / error**2,
        f"assumed, not measured: independent draws, and a correlation of {_CORRELATION:g} between an observable and a "
        "single loss; `patterning calibrate` measures it",
    )


def _of_run(error: float, file: Path, counts: Mapping[str, ChainCounts]) -> Needed | None:
    needed = 0.0
    for name, found in (_read(file) or {"subjects": {}})["subjects"].items():
        draws = found["num_chains"] * counts[name].num_draws if name in counts else 0
        for observable in found["observables"].values():
            if (r := observable.get("reliability")) is not None and 0 < r < 1:
                needed = max(needed, draws / 2 * (1 - r) / r / error**2)
    return Needed(needed, f"from the halves of the chains of {file}") if needed else None


def _of_calibration(error: float, file: Path) -> Needed | None:
    usable = [setting for setting in _read(file) or [] if not setting["failure"]]
    if not usable:
        return None
    best = usable[0]  # they are ranked
    ratios = [signal["ratio"] for signal in best["signals"].values() if signal["ratio"] is not None]
    return Needed(best["num_draws"] * max(ratios) / error**2, f"from {file}") if ratios else None


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
