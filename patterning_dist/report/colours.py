"""Groups of probe entries as colours: a style of figures.css each, the most frequent first."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from patterning_dist.errors import PatterningError

NUM_STYLES = 8  # group-0 to group-7 in figures.css
_KINDS = ("pattern", "domain", "label")


def kinds_of(index: Mapping[str, np.ndarray]) -> list[str]:
    """Columns that entries can be coloured by: those with two values or more."""
    return [kind for kind in _KINDS if kind in index and len(np.unique(index[kind].astype(str))) > 1]


class Colours:
    """Which style an entry has; all but the seven most frequent groups share one where there are more than eight.

    Args:
        index: what every entry is of [entry].
        kind: column of it; None: all have one colour.

    Raises:
        PatterningError: there is no such column.
    """

    def __init__(self, index: Mapping[str, np.ndarray], kind: str | None) -> None:
        if kind is not None and kind not in index:
            raise PatterningError(f"colour: '{kind}' is no column of the probe; it has {', '.join(index)}")
        size = len(next(iter(index.values())))
        self.groups = np.full(size, "all") if kind is None else index[kind].astype(str)
        names, counts = np.unique(self.groups, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        shown = order if len(names) <= NUM_STYLES else order[: NUM_STYLES - 1]
        self._styles = {str(names[k]): f"group-{number}" for number, k in enumerate(shown)}
        self.legend = [(self.style(str(names[k])), f"{names[k]} ({counts[k]:,})") for k in shown if kind is not None]
        if rest := counts[order[len(shown) :]].sum():
            self.legend.append(("group-rest", f"{len(names) - len(shown)} others ({rest:,})"))

    def style(self, group: str) -> str:
        """Of a group."""
        return self._styles.get(group, "group-rest")

    def share_between(self, values: np.ndarray, entries: np.ndarray) -> float:
        """Share of the variance of values [point] of some entries that lies between groups."""
        _, inverse = np.unique(self.groups[entries], return_inverse=True)
        counts = np.bincount(inverse)
        means = np.bincount(inverse, weights=values) / counts
        total = float(((values - values.mean()) ** 2).sum())
        return float(counts @ (means - values.mean()) ** 2) / total if total else 0.0
