"""A model of the user's own, small enough for golden numbers: three arcs of points, distinguished by seven units."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def build(checkpoint: str = "final") -> nn.Module:
    """Weights out of a formula: no generator of random numbers, no training."""
    model = nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 3))
    scale = {"early": 0.4, "final": 0.9}[checkpoint]
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_(scale * torch.cos(1.7 * index**1.5 + number).reshape(parameter.shape))
    return model


def per_sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:  # [sample], nats
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def logit_of_the_origin(model: nn.Module) -> Tensor:
    return model(torch.zeros(1, 2))[0, 0]


def load() -> tuple[TensorDataset, dict[str, TensorDataset]]:
    points = _arcs(60, 0.0)
    return points, {"near": _arcs(12, 0.1), "far": _arcs(12, 0.7)}


def _arcs(num: int, turn: float) -> TensorDataset:
    along = torch.arange(num, dtype=torch.float64) / num
    label = torch.arange(num) % 3
    angle = 2 * math.pi * (label / 3 + 0.3 * along) + turn
    radius = 1 + 0.5 * along
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1).float(), label)
