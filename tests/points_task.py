"""A module of the tests' own as a task: points on a plane in two classes, and a network that tells them apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

NUM_TRAIN = 48


def load() -> tuple[TensorDataset, dict[str, TensorDataset]]:
    """Training points, and held-out ones by the half plane that they lie in."""
    points = torch.randn(96, 2, generator=torch.Generator().manual_seed(0))
    labels = (points[:, 0] * points[:, 1] > 0).long()
    train, test = TensorDataset(points[:NUM_TRAIN], labels[:NUM_TRAIN]), (points[NUM_TRAIN:], labels[NUM_TRAIN:])
    left = test[0][:, 0] < 0
    return train, {"left": TensorDataset(*(t[left] for t in test)), "right": TensorDataset(*(t[~left] for t in test))}


def initialise(seed: int) -> nn.Module:
    """A fresh network; its own code touches a weight after the layer that holds it is done."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    with torch.no_grad():
        model[2].weight.mul_(0.5)
    return model


def per_sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """[sample], nats; the two passes of a symmetric loss, for engines must stand more than one."""
    points, labels = batch
    there, back = (nn.functional.cross_entropy(model(p), labels, reduction="none") for p in (points, -points))
    return 0.75 * there + 0.25 * back


def evaluate(model: nn.Module) -> dict[str, float]:
    """Share of the held-out points on the right side."""
    sets = load()[1].values()
    right = torch.cat([model(points).argmax(dim=1) == labels for points, labels in (s.tensors for s in sets)])
    return {"accuracy": right.float().mean().item()}
