"""Many small networks trained at once: one optimiser over parameters with a leading axis for the networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from patterning_dist.data.sampler import weighted_minibatch
from patterning_dist.sampling.samples import Batch, Samples, map_batch, to_device

Networks = dict[str, Tensor]  # parameter name -> [network, ...]

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


class Mapped(nn.Module):
    """A function of a network and a batch, as one of many networks.

    Args:
        function: (network, batch) -> Tensor.
        skeleton: a network; of its parameters the shapes count, buffers that no network has its own of are shared.
    """

    def __init__(self, function: Callable[[nn.Module, Batch], Tensor], skeleton: nn.Module) -> None:
        super().__init__()
        self.function, self.skeleton = function, skeleton

    def forward(self, batch: Batch) -> Tensor:
        """Of one network; ``torch.func`` puts its parameters in place."""
        return self.function(self.skeleton, batch)

    def of(self, networks: Networks, batch: Batch, *, own: bool = False) -> Tensor:
        """Of every network [network, ...]; `own`: the first axis of the batch is the network, for each has its own."""

        def one(parameters: Networks, batch: Batch) -> Tensor:
            return functional_call(self, {f"skeleton.{name}": p for name, p in parameters.items()}, (batch,))

        return vmap(one, in_dims=(0, 0 if own else None))(networks, batch)


class Stack(nn.Module):
    """Losses of every network; in any sum of them a parameter has the gradient of its own network."""

    def __init__(self, losses: Mapped, networks: Networks) -> None:
        super().__init__()
        self._losses = (losses,)  # not a submodule: its parameters are shapes and nothing else
        self._names, self._values = list(networks), nn.ParameterList(networks.values())

    @property
    def networks(self) -> Networks:
        return dict(zip(self._names, self._values, strict=True))

    def forward(self, batch: Batch) -> Tensor:
        """[network, sample, ...], nats; the axes of the batch are [network, sample, ...]."""
        return self._losses[0].of(self.networks, batch, own=True)


class TorchEngine:
    """Forward, backward and step of a module; what a DeepSpeed engine is in one process, without its cost a step."""

    global_steps = global_samples = micro_steps = skipped_steps = 0  # counters of DeepSpeed, for checkpoints

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = module, optimizer

    def __call__(self, batch: Batch) -> Tensor:
        return self.module(batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def zero_optimization_stage(self) -> int:
        return 0

    def destroy(self) -> None:
        """There is nothing to give back."""


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

    def run(self, phases: Sequence[Phase], after_step: Callable[[int], None] = lambda step: None) -> None:
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
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(self.step, settings.warmup_steps, settings.num_steps)
        ids = np.stack(
            [weighted_minibatch(seed, _BATCH_STREAM, self.step, settings.batch_size, cumulative) for seed in self.seeds]
        )
        losses = self.engine(stacked_batch(self.task.train, ids, self.device))
        self.engine.backward(losses.flatten(1).mean(dim=1).sum())
        self.engine.step()


def stack_networks(models: Sequence[nn.Module]) -> Networks:
    """Parameters of models of one kind, and of their buffers those that differ [network, ...]."""
    parameters, buffers = stack_module_state(list(models))
    own = {name: nn.Parameter(b, requires_grad=False) for name, b in buffers.items() if not (b == b[:1]).all()}
    return {**{name: nn.Parameter(p.detach(), p.requires_grad) for name, p in parameters.items()}, **own}


def stacked_batch(samples: Samples, ids: np.ndarray, device: str | torch.device) -> Batch:
    """Samples [network, sample, ...] by their numbers [network, sample]."""
    batch = to_device(samples[torch.from_numpy(ids.ravel())], device)
    return map_batch(lambda tensor: tensor.unflatten(0, ids.shape), batch)


def schedule(step: int, warmup: int, num_steps: int) -> float:
    """Factor of the learning rate: linear to 1 over the warm-up, then a half cosine to 0 at the end [1]."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def stacked_outputs(
    function: Callable[[nn.Module, Batch], Tensor],
    skeleton: nn.Module,
    networks: Networks,
    samples: Samples,
    at_once: int,
) -> np.ndarray:
    """A function of network and batch, on all samples under every network [network, sample, ...].

    Args:
        function: (network, batch) -> Tensor [sample, ...].
        skeleton: a network.
        networks: parameters by name [network, ...].
        samples: in order.
        at_once: samples of one forward pass, the same for all networks.
    """
    device, mapped, parts = next(iter(networks.values())).device, Mapped(function, skeleton), []
    with torch.no_grad():
        for ids in torch.arange(len(samples)).split(max(1, at_once)):
            parts.append(mapped.of(networks, to_device(samples[ids], device)).cpu())
    return torch.cat(parts, dim=1).numpy()
