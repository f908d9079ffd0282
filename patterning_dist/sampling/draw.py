"""One draw of a chain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Draw:
    """What one draw measured: deviations from the centre w*, in nats.

    ``observables`` [observable] float64; ``losses`` [probe column] float64: every probe entry, then the mean of every
    probe sample that has several; ``mean_loss`` L(w) - L(w*) over the probe entries.
    """

    number: int
    observables: np.ndarray
    losses: np.ndarray
    mean_loss: float
