"""Samples that carry their weights: a chain over them is on L_rho = sum_i rho_i l_i / sum_i rho_i."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patterning_dist.sampling.layered import Layered, State
from patterning_dist.sampling.samples import Batch, PerSampleLoss, Samples


class Weighted:
    """Batches (batch, rho), with rho of mean 1 over all losses that count.

    Args:
        samples: plain.
        weights: rho [sample] or [sample, position].
        counted: which losses count, likewise; None: all.
    """

    def __init__(self, samples: Samples, weights: np.ndarray, counted: np.ndarray | None = None) -> None:
        mean = (weights if counted is None else weights[counted]).mean()
        self.samples, self.weights = samples, torch.from_numpy(weights / mean).float()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, ids: Any) -> tuple[Batch, Tensor]:
        return self.samples[ids], self.weights[ids]


class Plain:
    """Batches (batch, 1): samples beside weighted ones, each of which weighs 1.

    Args:
        samples: plain.
        has_positions: whether a sample has several losses.
    """

    def __init__(self, samples: Samples, has_positions: bool) -> None:
        self.samples, self._more = samples, [1] * has_positions

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, ids: Any) -> tuple[Batch, Tensor]:
        return self.samples[ids], torch.ones(len(ids), *self._more)


class WeightedLayers:
    """A ``Layered`` model over such batches."""

    def __init__(self, layered: Layered) -> None:
        self.layered, self.pays_once = layered, layered.pays_once

    def below(self, batch: tuple[Batch, Tensor], room: int) -> State:
        """Weights bear on losses only."""
        return self.layered.below(batch[0], room)

    def above(self, state: State, batch: tuple[Batch, Tensor]) -> Tensor:
        """rho_i l_i."""
        return batch[1] * self.layered.above(state, batch[0])


def weighted_losses(losses: PerSampleLoss) -> PerSampleLoss:
    """(model, (batch, rho)) -> rho_i l_i, nats; their mean over all samples is L_rho."""

    def weighted(model: nn.Module, batch: tuple[Batch, Tensor]) -> Tensor:
        return batch[1] * losses(model, batch[0])

    return weighted
