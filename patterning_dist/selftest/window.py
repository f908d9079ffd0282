"""A window whose prediction comes true: what a training under weights will do, said before it is run."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from patterning_dist.models.components import axpy, select_component
from patterning_dist.sampling.steps import Steps
from patterning_dist.sampling.target import Target
from patterning_dist.sampling.window import Rule, metric, window_move
from patterning_dist.selftest.check import Check

_LEFT_OUT = 0.1  # of the prediction: the noise of minibatches, and how the metric changes along the way
_NUM_POINTS, _NUM_HELD_OUT, _BATCH, _STEPS, _SEEDS = 512, 6000, 128, 96, 16
_RULES = {"SGD": Rule(0.02, 0.01), "AdamW": Rule(0.0005, 0.1, 1e-8)}
_MOMENTUM = {"SGD": 0.0, "AdamW": 0.9}


def windows() -> Iterator[Check]:
    """Held-out loss of a group of points that weighs 1.8, the other 0.2, after a training from a checkpoint.

    Less that after the training at equal weights. Predicted by the steps of a window
    (``sampling.window``), in one segment; realised by torch's own optimizers.
    """
    torch.manual_seed(0)
    x, y = _points(_NUM_POINTS, 0)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    weights = {"base": torch.ones(len(x)), "up": torch.where(x[:, 5] > 0, 1.8, 0.2)}
    for name, rule in _RULES.items():
        steps = Steps(np.ones(_STEPS), 0, _MOMENTUM[name])
        predicted = {arm: _predicted(model, TensorDataset(x, y, rho), rule, steps) for arm, rho in weights.items()}
        realised = {arm: [_trained(model, x, y, rho, rule, s) for s in range(_SEEDS)] for arm, rho in weights.items()}
        differences = np.subtract(realised["up"], realised["base"])
        expected, error = predicted["up"] - predicted["base"], differences.std(ddof=1) / math.sqrt(_SEEDS)
        text = f"loss after a window of {name} under weights, as predicted"
        yield Check(text, expected, float(differences.mean()), float(error), _LEFT_OUT * abs(expected))


def _points(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two groups whose classes lie along different directions; a third of the labels is wrong."""
    generator = torch.Generator().manual_seed(seed)
    x, second = torch.randn(number, 6, generator=generator), torch.arange(number) % 2 > 0
    x[:, 5] = second
    sign = torch.where(second, x[:, 1] - x[:, 2], x[:, 0] + 0.5 * x[:, 1])
    return x, ((sign > 0) ^ (torch.rand(number, generator=generator) < 0.3)).long()


def _batches(seed: int, number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(_NUM_POINTS, generator=generator)[:_BATCH] for _ in range(number)]


def _held_out_loss(model: nn.Module) -> float:
    x, y = _points(2 * _NUM_HELD_OUT, 1)
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x[1::2]), y[1::2]).item()


def _predicted(model: nn.Module, data: TensorDataset, rule: Rule, steps: Steps) -> float:
    model = copy.deepcopy(model)
    target = Target(
        model,
        select_component(model, "everything"),
        lambda model, batch: batch[2] * nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none"),
        data,
        data,
        micro_batch_size=_NUM_POINTS,
    )
    gradients = [target.gradient(ids.numpy())[1] for ids in _batches(_SEEDS, 60)]
    squares = {name: torch.stack([g[name].square() for g in gradients]).mean(dim=0) for name in target.center}
    rates, decays = metric(dict.fromkeys(target.center, rule), squares)
    pull = {name: decays[name] * w for name, w in target.center.items()}
    move = window_move(
        lambda v: {
            name: curved + decays[name] * v[name] for name, curved in target.hessian_product(target.probe, v).items()
        },
        axpy(1.0, target.mean_gradient(target.probe)[1], pull),
        {name: torch.zeros_like(w) for name, w in target.center.items()},
        rates,
        target.dot,
        steps,
        num_products=8,
    )
    target.move_to(axpy(1.0, move.vector, target.center))
    return _held_out_loss(model)


def _trained(model: nn.Module, x: Tensor, y: Tensor, rho: Tensor, rule: Rule, seed: int) -> float:
    model = copy.deepcopy(model).requires_grad_(True)
    kind = torch.optim.SGD if rule.stability is None else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=rule.rate, weight_decay=rule.decay)
    for ids in _batches(seed, _STEPS):
        optimizer.zero_grad()
        (rho[ids] * nn.functional.cross_entropy(model(x[ids]), y[ids], reduction="none")).mean().backward()
        optimizer.step()
    return _held_out_loss(model)
