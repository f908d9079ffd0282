"""Many small networks as one: parameters with a leading axis for the networks, and functions mapped over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from patterning_dist.sampling.samples import Batch, Samples, map_batch, to_device

Networks = dict[str, Tensor]  # parameter name -> [network, ...]


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


def stack_networks(models: Sequence[nn.Module]) -> Networks:
    """Parameters of models of one kind, and of their buffers those that differ [network, ...]."""
    parameters, buffers = stack_module_state(list(models))
    own = {name: nn.Parameter(b, requires_grad=False) for name, b in buffers.items() if not (b == b[:1]).all()}
    return {**{name: nn.Parameter(p.detach(), p.requires_grad) for name, p in parameters.items()}, **own}


def stacked_batch(samples: Samples, ids: np.ndarray, device: str | torch.device) -> Batch:
    """Samples [network, sample, ...] by their numbers [network, sample]."""
    batch = to_device(samples[torch.from_numpy(ids.ravel())], device)
    return map_batch(lambda tensor: tensor.unflatten(0, ids.shape), batch)


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
