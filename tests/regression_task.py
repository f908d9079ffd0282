"""A linear regression as a module task: its posterior is Gaussian under any weights, so every response is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def load() -> tuple[TensorDataset, dict[str, TensorDataset]]:
    """Training points, and held-out ones along another line."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 3, generator=generator)
    y = x @ torch.tensor([0.5, -1.0, 0.3]) + 0.4 * torch.randn(100, generator=generator) + 0.5 * (x[:, 0] > 0.5)
    return TensorDataset(x[:40], y[:40]), {"other": TensorDataset(x[40:], y[40:] + 0.8 * x[40:, 1])}


def build(checkpoint: str) -> nn.Module:
    """The true line, without what bends it: not the minimum of the loss."""
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -1.0, 0.3]]))
        model.bias.zero_()
    return model


def per_sample_loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Half the squared error."""
    return 0.5 * (model(batch[0])[:, 0] - batch[1]).square()
