"""What is kept of the draws of one chain besides co-moments and traces: one seam, which a user may fill too.

A statistic sees every draw once, in order, with the target at the draw's position. Its state goes into the chain's
checkpoints, and its result beside the chain's other files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from patterning_dist.models.components import Vector
from patterning_dist.sampling.target import Target


@dataclass(frozen=True)
class Draw:
    """What one draw measured: deviations from the centre w*, in nats.

    ``observables`` [observable] float64; ``losses`` [probe column] float64: every probe entry, then the mean of every
    probe sample that has several; ``mean_loss`` L(w) - L(w*) of the chain's own posterior, on the probe entries.
    """

    number: int
    observables: np.ndarray
    losses: np.ndarray
    mean_loss: float


class Statistic(Protocol):
    """Anything that can be reduced draw by draw."""

    def update(self, draw: Draw, target: Target) -> None:
        """Take in the next draw; on a chain group every rank calls this."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All that ``load_state_dict`` needs to go on, as tensors of this rank."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        ...

    def flush(self) -> None:
        """Write what is written on the way, if anything is: the chain may be resumed from here."""
        ...

    def result(self) -> dict[str, np.ndarray] | None:
        """What is kept of the whole chain, this rank's part; None: nothing, or it is on disk already."""
        ...


class PositionMeans:
    """Means over the draws of w and of the gradients of the split losses, for the response direction."""

    def __init__(self, target: Target) -> None:
        num_rows = 1 + (0 if target.coefficients is None else len(target.coefficients))
        self.sums = torch.zeros(num_rows, flatten(target.center).numel(), dtype=torch.float64)
        self.num_draws = 0

    def update(self, draw: Draw, target: Target) -> None:
        """One forward and backward pass a split loss."""
        rows = (target.live(), *target.split_gradients())
        self.sums += torch.stack([flatten(row) for row in rows])
        self.num_draws += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Sums and their count."""
        return {"sums": self.sums.clone(), "num_draws": torch.tensor(self.num_draws)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self.sums, self.num_draws = state["sums"].clone(), int(state["num_draws"])

    def flush(self) -> None:
        """Nothing is written on the way."""

    def result(self) -> dict[str, np.ndarray]:
        """``means`` [1 + split loss, coordinate of this rank], float64."""
        return {"means": self.sums.numpy() / self.num_draws}


class Positions:
    """Positions of some draws of a chain, as many at equal distances as are asked for, for first moments.

    Args:
        target: that the chain walks on.
        num_draws: of the chain.
        num_kept: of them, at most.
    """

    def __init__(self, target: Target, num_draws: int, num_kept: int) -> None:
        # The last draws of equal parts of the chain.
        ends = torch.arange(1, min(num_kept, num_draws) + 1) * num_draws // min(num_kept, num_draws) - 1
        self.numbers = ends.tolist()
        self.kept = torch.zeros(len(self.numbers), flatten(target.center).numel())

    def update(self, draw: Draw, target: Target) -> None:
        """A copy of the weights, where this draw is one of them."""
        if draw.number in self.numbers:
            self.kept[self.numbers.index(draw.number)] = flatten(target.live()).float()

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept so far."""
        return {"kept": self.kept.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self.kept = state["kept"].clone()

    def flush(self) -> None:
        """Nothing is written on the way."""

    def result(self) -> dict[str, np.ndarray]:
        """``positions`` [kept draw, coordinate of this rank], float32."""
        return {"positions": self.kept.numpy()}


def flatten(vector: Vector) -> Tensor:
    """All coordinates of this rank in one row, float64 on the CPU."""
    return torch.cat([t.double().cpu().flatten() for t in vector.values()])


def unflatten(flat: np.ndarray | Tensor, like: Vector) -> Vector:
    """The inverse of ``flatten``, with the shapes, type and device of ``like``."""
    pieces, start, flat = {}, 0, torch.as_tensor(flat)
    for name, w in like.items():
        pieces[name] = flat[start : start + w.numel()].reshape(w.shape).to(w)
        start += w.numel()
    return pieces
