"""A small classifier of noisy points in two groups, as a module task: what a window is tried on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

NUM_TRAIN, NUM_HELD_OUT = 512, 6000


def points(seed: int, number: int, group: int | None) -> TensorDataset:
    """Two groups whose classes lie along different directions; a third of the labels is wrong."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(number) % 2 if group is None else torch.full((number,), group)
    x = torch.randn(number, 6, generator=generator)
    sign = torch.where(groups == 0, x[:, 0] + 0.5 * x[:, 1], x[:, 1] - x[:, 2])
    label = (sign > 0) ^ (torch.rand(number, generator=generator) < 0.3)
    x[:, 5] = groups
    return TensorDataset(x, label.long())


def load() -> tuple[TensorDataset, dict[str, TensorDataset]]:
    """Training points of both groups, and held-out ones of each."""
    return points(0, NUM_TRAIN, None), {"first": points(3, NUM_HELD_OUT, 0), "second": points(4, NUM_HELD_OUT, 1)}


def initialise(seed: int) -> nn.Module:
    """One hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 2))


def per_sample_loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Cross-entropy."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
