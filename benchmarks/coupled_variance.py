"""How much less does a response vary that coupled chains measure, at the cost of independent ones?

Two sets of chains, on L_rho with rho = 1 + s h at two strengths, give the response of an observable phi as the
difference of its means. Coupled, chain k of either has the same noise and minibatches; independent, chain k is held
against chain k + 1 of the other set: the same draws, the same cost, other pairs. The ratio of the variances over chains
is what coupling is worth. A singular toy, 1/2 (u v x - y)^2 at its singular point, and the classifier of
examples/digits.py.

    OMP_NUM_THREADS=1 python benchmarks/coupled_variance.py     # about a minute on a quiet core
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from patterning_dist import Posterior, sample_chains
from patterning_dist.measure.weighted import Plain, Weighted, weighted_losses

# Slopes at 0 by the symmetric difference, and changes at two strengths; ±0.1 and 1 are defaults of `check.strengths`.
PAIRS = {
    "slope, ±0.1": (-0.1, 0.1),
    "slope, ±0.25": (-0.25, 0.25),
    "change at 0.25": (0.0, 0.25),
    "change at 1": (0.0, 1.0),
}
SEEDS = (0, 1, 2)
SHARE = 0.8  # effective share of the samples under the weights at strength 1
AIM = 50.0


class Case(NamedTuple):
    """A model at w*, its losses and samples, h up to its size, what responds, and how the chains walk."""

    name: str
    model: nn.Module
    losses: Callable[[nn.Module, Any], Tensor]
    train: TensorDataset
    h: np.ndarray
    phi: Callable[[nn.Module], Tensor]
    settings: dict[str, Any]


class Product(nn.Module):
    """u v x, at u = v = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.factors.prod() * x


def toy() -> Case:
    """Samples of steep and of flat losses; phi is u^2."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, generator=generator), 0.5 * torch.randn(64, generator=generator)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return 0.5 * (model(batch[0]) - batch[1]).square()

    h = np.where(np.argsort(np.argsort(x.abs().numpy())) < 32, -1.0, 1.0)
    settings = dict(posterior=Posterior(300, 5), step_size=2e-3, burn_in=100, num_draws=80, steps_between_draws=5)
    settings |= dict(num_chains=12, batch_size=16)
    data = TensorDataset(x, y)
    return Case("singular toy", Product(), losses, data, h, lambda model: model.factors[0] ** 2, settings)


def digits() -> Case:
    """More weight for eights; phi is the loss on eights that were not trained on."""
    file = Path(__file__).parents[1] / "examples" / "digits.py"
    spec = importlib.util.spec_from_file_location("digits", file)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    h = np.where(example.train.tensors[1].numpy() == 8, 1.0, 0.0)
    settings = dict(posterior=Posterior(300, 100), step_size=1e-3, burn_in=100, num_draws=40, steps_between_draws=5)
    settings |= dict(num_chains=8, batch_size=32)
    return Case("digits", example.build(), example.per_sample_loss, example.train, h, example.loss_on_eights, settings)


def means(case: Case, strength: float, seed: int) -> np.ndarray:
    """Mean of phi over the draws of every chain [chain]."""
    h = case.h - case.h.mean()
    data = Weighted(case.train, 1 + strength * h / h.std() * (1 / SHARE - 1) ** 0.5)
    probe = Plain(TensorDataset(*(part[:8] for part in case.train.tensors)), False)
    found = sample_chains(
        case.model,
        weighted_losses(case.losses),
        data,
        probe,
        observables={"phi": case.phi},
        seed=seed,
        **case.settings,
    )
    assert not found.excluded
    return found.traces[:, :, 1].mean(axis=1)


def main() -> None:
    """Measure, print the table, and say where coupling is worth what is aimed at."""
    print(f"{'case':<14}{'response':<16}{'value':>20}{'variance, independent / coupled':>33}{'by seed':>20}")
    for case in (toy(), digits()):
        started = time.perf_counter()
        strengths = sorted({strength for pair in PAIRS.values() for strength in pair})
        found = {(strength, seed): means(case, strength, seed) for strength in strengths for seed in SEEDS}
        for name, (low, high) in PAIRS.items():
            scale = 1 / (high - low) if name.startswith("slope") else 1.0
            coupled = [scale * (found[high, seed] - found[low, seed]) for seed in SEEDS]
            independent = [scale * (found[high, seed] - np.roll(found[low, seed], 1)) for seed in SEEDS]
            variances = [[values.var(ddof=1) for values in kind] for kind in (independent, coupled)]
            ratio, every = np.mean(variances[0]) / np.mean(variances[1]), np.concatenate(coupled)
            value = f"{every.mean():+.3g} ± {every.std(ddof=1) / len(every) ** 0.5:.1g}"
            seeds = ", ".join(f"{a / b:.0f}" for a, b in zip(*variances, strict=True))
            words = "" if ratio >= AIM else f"   below the aim of {AIM:g}"
            print(f"{case.name:<14}{name:<16}{value:>20}{ratio:>33.0f}{seeds:>20}{words}")
        print(f"{'':<14}{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
