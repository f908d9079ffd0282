"""The sum of the largest values of a stream, exactly, without the others."""

from __future__ import annotations

import numpy as np

from patterning_dist.response.moments import Floats


class Heaviest:
    """The `number` largest of all values added. Keeps no more than three times as many."""

    def __init__(self, number: int) -> None:
        self._number, self._kept, self._least = number, np.empty(0), -np.inf
        self._waiting: list[Floats] = []

    def add(self, values: Floats) -> None:
        """Pieces of the stream."""
        # One equal to the least that is kept adds nothing: it would take the place of its like.
        self._waiting.append(values[values > self._least])
        if sum(map(len, self._waiting)) > self._number:
            self._settle()

    def total(self) -> float:
        """Their sum; of all where there are no more."""
        self._settle()
        return float(self._kept.sum())

    def _settle(self) -> None:
        values, self._waiting = np.concatenate([self._kept, *self._waiting]), []
        if len(values) >= self._number:
            cut = len(values) - self._number
            values = np.partition(values, cut)[cut:].copy()
            self._least = float(values.min())
        self._kept = values
