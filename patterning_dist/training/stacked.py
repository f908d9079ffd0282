"""Many small networks trained at once on samples drawn by weights: one optimiser over a stack of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from patterning_dist.data.sampler import weighted_minibatch
from patterning_dist.heartbeat import beat
from patterning_dist.sampling.samples import Batch, Samples
from patterning_dist.training.stack import Mapped, Networks, Stack, TorchEngine, stack_networks, stacked_batch

# Stream of the counter-based sampler, apart from those of chains.
_BATCH_STREAM = 0x737472696E6773


class Stackable(Protocol):
    """What a stack asks of a ``Task``: a small module that ``torch.func.vmap`` can map over, and its losses."""

    train: Samples

    def build(self, seed: int) -> nn.Module: ...
    def losses(self, model: nn.Module, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class Phase:
    """Steps [start of the phase, `until`) draw samples with probabilities proportional to `weights` [sample]."""

    until: int
    weights: np.ndarray


class StackSettings(NamedTuple):
    """Steps, minibatch of each network, and AdamW (Loshchilov & Hutter 1711.05101); the rate is that after warm-up."""

    num_steps: int
    warmup_steps: int
    batch_size: int
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float


class StackedTraining:
    """Networks of several seeds in training; a pure function of (task, settings, seeds, phases).

    AdamW on the mean loss of a minibatch of its own for every network. Networks do not see each other, but the last
    bits of a batched product depend on how many are stacked: whoever wants the same networks again must stack the same
    seeds.

    Args:
        task: gives fresh networks, training samples and losses.
        settings: of the steps.
        seeds: of the networks [network]; initial weights and minibatches follow from them.
        device: torch device.
        make_engine: (module, optimiser) -> what takes the steps, TorchEngine or a DeepSpeed engine.
    """

    def __init__(
        self,
        task: Stackable,
        settings: StackSettings,
        seeds: Sequence[int],
        device: str = "cpu",
        make_engine: Callable[[nn.Module, torch.optim.Optimizer], Any] = TorchEngine,
    ) -> None:
        self.task, self.settings, self.seeds, self.device = task, settings, list(seeds), device
        models = [task.build(seed) for seed in seeds]
        self.skeleton = models[0].to(device)
        stack = Stack(Mapped(task.losses, self.skeleton), stack_networks(models)).to(device)
        self.parameters = stack.networks
        self.optimizer = torch.optim.AdamW(
            stack.parameters(), betas=settings.betas, weight_decay=settings.weight_decay, foreach=True
        )
        self.engine = make_engine(stack, self.optimizer)
        self.step = 0

    def run(self, phases: Sequence[Phase], after_step: Callable[[int], object] = lambda step: None) -> None:
        """Go on to the end of the last phase; `after_step` is called with the number of steps done."""
        for phase in phases:
            cumulative = np.cumsum(phase.weights, dtype=np.float64)
            while self.step < phase.until:
                self._one_step(cumulative)
                self.step += 1
                after_step(self.step)

    def networks(self) -> Networks:
        """Copies of the parameters, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.parameters.items()}

    def _one_step(self, cumulative: np.ndarray) -> None:
        beat()
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(self.step, settings.warmup_steps, settings.num_steps)
        ids = np.stack(
            [weighted_minibatch(seed, _BATCH_STREAM, self.step, settings.batch_size, cumulative) for seed in self.seeds]
        )
        losses = self.engine(stacked_batch(self.task.train, ids, self.device))
        self.engine.backward(losses.flatten(1).mean(dim=1).sum())
        self.engine.step()


def schedule(step: int, warmup: int, num_steps: int) -> float:
    """Factor of the learning rate: linear to 1 over the warm-up, then a half cosine to 0 at the end [1]."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))
