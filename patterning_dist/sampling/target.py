"""What a chain walks on: a model at a checkpoint w*, of which one component may move."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from patterning_dist.models.components import Vector
from patterning_dist.sampling.noise import Extent
from patterning_dist.sampling.ranks import Ranks


class Measurement(NamedTuple):
    """What a draw measures, absolute, float64 on the CPU, in nats.

    ``observables`` [observable]; ``losses`` [probe column]: every probe entry, then, where a sample has several, the
    mean of every sample; ``mean_loss`` L(w), the mean over the probe entries.
    """

    observables: Tensor
    losses: Tensor
    mean_loss: float


class Target(Protocol):
    """A model as a function of the free coordinates of one component.

    On a chain group every rank holds a target over its part of the model, and all ranks call the methods together.

    Attributes:
        name: of the component.
        center: w*, piece name -> this rank's free coordinates, float32.
        extents: piece name -> flat elements [start, stop) of the whole piece that this rank holds.
        totals: piece name -> number of elements of the whole piece, on all ranks.
        ranks: the chain group.
        device: of the coordinates.
    """

    name: str
    center: Vector
    extents: dict[str, Extent]
    totals: dict[str, int]
    ranks: Ranks
    device: torch.device

    def live(self) -> Vector:
        """The coordinates themselves: views into the model's parameters, to be moved in place."""
        ...

    def gradient(self, ids: np.ndarray) -> tuple[float, Vector]:
        """Mean loss of the training samples ``ids`` in nats, and its gradient."""
        ...

    def split_gradients(self) -> list[Vector]:
        """Gradients of the split losses at the present position, in the order of the observables."""
        ...

    def measure(self) -> Measurement:
        """Observables and probe losses at the present position."""
        ...


def columns(losses: Tensor) -> Tensor:
    """Probe losses [sample] or [sample, position] -> columns: every entry, then the means of samples with several."""
    losses = losses.double().cpu()
    return torch.cat([losses.flatten(), losses.mean(dim=1)]) if losses.dim() == 2 else losses
