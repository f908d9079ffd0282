"""Has Muon a window? A mean flow in the metric of its noise, against trainings of a small attention-only transformer.

Where noise outweighs the mean gradient, the step of Muon on a matrix is linear in that mean: with m_t = sum_j mu^j
g_(t-j) and u_t = g_t + mu m_t, of mean c_t g and covariance v_t S + c_t^2 g g^T,

    E orth(u_t) ~ c_t (v_t S + c_t^2 g g^T)^-1/2 g ,   c_t = 1 + mu sum_(j<=t) mu^j ,
                                                       v_t = (1 + mu)^2 + sum_(1<=j<=t) mu^(2 j + 2)

The prediction follows this flow with fresh gradients every five steps, far dearer than a walk of stage ``predict``.

    OMP_NUM_THREADS=1 python benchmarks/muon_window.py     # five to ten minutes
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from windows import LENGTH, NUM_TRAIN, VOCABULARY, Fresh

from patterning_dist.config import AttentionOnlyConfig, TrainingConfig
from patterning_dist.data.sampler import epoch_batch
from patterning_dist.models.attention import AttentionOnlyTransformer
from patterning_dist.tasks.optimizers import head_matrix_optimizer, learning_rate_factor, set_learning_rate_factor

BATCH, ENDS, ORDERS, NUM_BATCHES, EVERY, MOMENTUM = 16, (5, 10, 15, 20, 40), 6, 64, 5, 0.95
CONFIG = AttentionOnlyConfig(num_heads=2, d_model=32, d_head=16)


class Heads(Fresh):
    """The transformer task of windows.py with the package's own model."""

    def build(self, seed: int) -> nn.Module:
        return AttentionOnlyTransformer(CONFIG, VOCABULARY, LENGTH, seed)

    def trained(self) -> nn.Module:
        """The baseline, by Muon to rate 0."""
        model, steps = self.build(self.seed), 500
        optimizer = muon(model, 1.0)
        for step in range(steps):
            set_learning_rate_factor(optimizer, learning_rate_factor(step, steps // 2, 10, steps // 2))
            self.step(model, optimizer, epoch_batch(self.seed, step, 2 * BATCH, NUM_TRAIN), None)
        return model

    def gradients(self, model: nn.Module, ids: np.ndarray, rho: Tensor | None) -> None:
        losses = self.losses(model, self.train[ids])
        (losses if rho is None else losses * rho[ids, None]).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, ids: np.ndarray, rho: Tensor | None) -> None:
        self.gradients(model, ids, rho)
        optimizer.step()
        optimizer.zero_grad()

    def split(self, model: nn.Module) -> Tensor:
        """Losses of both groups, held out."""
        with torch.no_grad():
            return torch.stack([self.losses(model, samples[:1500]).mean() for samples in self.held_out.values()])


def muon(model: nn.Module, factor: float) -> torch.optim.Optimizer:
    """The package's recipe: .04 on the heads, .01 on the rest, times a factor."""
    rates = {"matrix_learning_rate": 0.04 * factor, "learning_rate": 0.01 * factor}
    return head_matrix_optimizer(model, TrainingConfig(batch_size=BATCH, optimizer="muon", **rates))


def realised(task: Heads, factor: float, rho: Tensor | None, order: int) -> Iterator[Tensor]:
    model = task.load("", None)
    optimizer = muon(model, factor)
    for step in range(max(ENDS)):
        task.step(model, optimizer, epoch_batch(order, step, BATCH, NUM_TRAIN), rho)
        if step + 1 in ENDS:
            yield task.split(model)


def predicted(task: Heads, factor: float, rho: Tensor | None) -> Iterator[Tensor]:
    model = task.load("", None)
    rates = {id(p): group["lr"] for group in muon(model, factor).param_groups for p in group["params"]}
    for t in range(max(ENDS)):
        if t % EVERY == 0:
            found = []
            for number in range(NUM_BATCHES):
                batch = t * NUM_BATCHES + number
                task.gradients(model, epoch_batch(10**6, batch, BATCH, NUM_TRAIN), rho)
                found.append([copy.deepcopy(p.grad) for p in model.parameters()])
                model.zero_grad()
            gradients = [torch.stack(one) for one in zip(*found, strict=True)]
        for parameter, g in zip(model.parameters(), gradients, strict=True):
            move = flow(g, t) if parameter.dim() == 3 else g.mean(0) / (g.square().mean(0).sqrt() + 1e-8)
            parameter.data -= rates[id(parameter)] * move
        if t + 1 in ENDS:
            yield task.split(model)


def flow(gradients: Tensor, t: int) -> Tensor:
    """The mean of a step of Muon over its rate, from gradients of minibatches [batch, head, row, column]."""
    rows, columns = gradients.shape[-2:]
    lying = gradients.mT if rows > columns else gradients
    mean = lying.mean(0)
    noise = lying - mean
    c = 1 + MOMENTUM * sum(MOMENTUM**j for j in range(t + 1))
    v = (1 + MOMENTUM) ** 2 + sum(MOMENTUM ** (2 * j + 2) for j in range(1, t + 1))
    second = v * (noise @ noise.mT).sum(0) / (len(gradients) - 1) + c * c * mean @ mean.mT
    values, vectors = torch.linalg.eigh(second)
    step = c * (vectors * values.clamp(min=1e-12).rsqrt().unsqueeze(-2)) @ vectors.mT @ mean
    return max(1.0, rows / columns) ** 0.5 * (step.mT if rows > columns else step)


def main() -> None:
    torch.set_num_threads(1)
    task = Heads("transformer", 0)
    h = torch.where(torch.arange(NUM_TRAIN) % 2 == 0, 1.0, -1.0)
    print("| rate | strength | " + " | ".join(f"{end} steps" for end in ENDS) + " |")
    print("| --: | --: | " + " | ".join("---" for _ in ENDS) + " |")
    for factor in (1.0, 0.25, 0.0625):
        for strength in (0.25, 0.8):
            rho = 1 + strength * h
            came = torch.stack(
                [
                    torch.stack(list(realised(task, factor, rho, k)))
                    - torch.stack(list(realised(task, factor, None, k)))
                    for k in range(ORDERS)
                ]
            )
            said = torch.stack(list(predicted(task, factor, rho))) - torch.stack(list(predicted(task, factor, None)))
            cells = [" ".join(f"{x:.2f}" for x in row) for row in (came.mean(0) / said).tolist()]
            print(f"| {0.04 * factor:g} | {strength:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
