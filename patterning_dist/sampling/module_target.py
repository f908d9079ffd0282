"""Any model as a chain's target, whole on one device or sharded over the ranks of a chain group.

A model takes part through one function, the losses of a batch of samples; minibatches and probe are shared out over the
ranks, and the mean is always that of the global minibatch: sum over ranks and micro-batches of sum(losses) / count.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from patterning_dist.errors import PatterningError
from patterning_dist.models.components import Component, Piece, Vector
from patterning_dist.sampling.noise import Extent
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.target import Measurement, columns

PerSampleLoss = Callable[[nn.Module, Any], Tensor]


class Samples(Protocol):
    """Samples addressed by number: ``len()``, and ids [sample] -> a batch (a tensor or a tuple of tensors)."""

    def __len__(self) -> int: ...
    def __getitem__(self, ids: Any) -> Any: ...


class ModuleTarget:
    """A ``Target`` over any module; see there.

    Args:
        model: at w*, float32; its parameters become this object's working copy. On several ranks: sharded on axis 0 by
            ``sampling.shard.shard_model``.
        component: what may move.
        per_sample_loss: (model, batch) -> losses [sample] or [sample, position] in nats, differentiable.
        data: training samples of the minibatches.
        probe: samples whose losses are recorded.
        held_out: samples of the split losses phi_k = sum coefficients[k] * losses.
        coefficients: [observable, held-out sample(, position)].
        functions: the user's observables, model -> Tensor [k]; they come last.
        num_component_losses: how many observables are the probe's mean loss itself; they come first.
        micro_batch_size: samples that one forward pass takes at most.
        compute_dtype: of the forward pass under autocast; the sampled weights stay float32.
        ranks: the chain group.

    Raises:
        PatterningError: parameters that are not float32, or losses of a wrong shape or not finite at w*.
    """

    def __init__(
        self,
        model: nn.Module,
        component: Component,
        per_sample_loss: PerSampleLoss,
        data: Samples,
        probe: Samples,
        *,
        held_out: Samples | None = None,
        coefficients: Tensor | None = None,
        functions: tuple[Callable[[nn.Module], Tensor], ...] = (),
        num_component_losses: int = 0,
        micro_batch_size: int = 16,
        compute_dtype: torch.dtype | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.component, self.per_sample_loss = (
            model.eval().requires_grad_(False),
            component,
            per_sample_loss,
        )
        self.data, self.probe, self.held_out, self.coefficients = data, probe, held_out, coefficients
        self.functions, self.num_component_losses = functions, num_component_losses
        self.micro_batch_size, self.compute_dtype = micro_batch_size, compute_dtype
        self.name, self.ranks = component.name, ranks or Ranks()
        parameters = dict(model.named_parameters())
        self._moving = {name: parameters[name] for name in component.parameters}
        for name, parameter in self._moving.items():
            if parameter.dtype != torch.float32:
                raise PatterningError(
                    f"parameter {name} is {parameter.dtype}; sampled weights must be float32, since smaller types "
                    "swallow the steps: load the model in float32 and set compute_dtype instead"
                )
            parameter.requires_grad_(True)
        self.device = next(iter(self._moving.values())).device
        self.totals = {piece.name: piece.num_coordinates for piece in component.pieces}
        self.extents = {piece.name: _extent(piece, self._moving[piece.parameter]) for piece in component.pieces}
        self.center = {name: w.clone() for name, w in self.live().items()}
        self._check_losses()

    def live(self) -> Vector:
        """Views into the model's parameters, this rank's part of each piece."""
        return self._views({name: p.detach() for name, p in self._moving.items()})

    def gradient(self, ids: np.ndarray) -> tuple[float, Vector]:
        """Mean loss of the training samples ``ids`` in nats, and its gradient."""
        total = torch.zeros((), dtype=torch.float64)
        for part, real in self._micro_batches(ids):
            with self._autocast():
                losses = self.per_sample_loss(self.model, self._batch(self.data, part)).float()
            # Every sample has as many losses, so the count of the global minibatch is known here.
            loss = losses.sum() * (real / (losses.numel() / len(part) * len(ids)))
            loss.backward()
            total += loss.detach().double().cpu()
        # A parameter that the loss did not reach has no gradient; its coordinates move by the prior alone.
        gradient = self._views(
            {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self._moving.items()}
        )
        for parameter in self._moving.values():
            parameter.grad = None
        return self.ranks.sum(total).item(), gradient

    def measure(self) -> Measurement:
        """Observables and probe losses at the present position."""
        with torch.no_grad():
            probe = self._losses(self.probe)
            observables = [probe.mean().expand(self.num_component_losses)]
            if self.held_out is not None:
                losses = self._losses(self.held_out)
                observables.append((self.coefficients.double() * losses).flatten(1).sum(dim=1))
            with self._autocast():
                observables += [_whole(f(self.model)).double().cpu().reshape(-1) for f in self.functions]
        return Measurement(torch.cat(observables), columns(probe), probe.mean().item())

    def _losses(self, samples: Samples) -> Tensor:
        """Losses of all samples, float64 on the CPU, the same on every rank."""
        parts = []
        for part, real in self._micro_batches(np.arange(len(samples))):
            with self._autocast():
                losses = self.per_sample_loss(self.model, self._batch(samples, part))
            parts.append(losses.float()[: len(part) if real else 0])
        return self.ranks.gather(torch.cat(parts), len(samples)).double().cpu()

    def _micro_batches(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, bool]]:
        """This rank's ids, and whether they count: ranks with less to do repeat a sample, for a sharded model's forward
        and backward passes need all ranks."""
        start, stop = self.ranks.share(len(ids))
        mine, longest = ids[start:stop], -(-len(ids) // self.ranks.size)
        for first in range(0, longest, self.micro_batch_size):
            part = mine[first : first + self.micro_batch_size]
            yield (part, True) if len(part) else (ids[:1], False)

    def _batch(self, samples: Samples, ids: np.ndarray) -> Any:
        return to_device(samples[torch.from_numpy(ids)], self.device)

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.compute_dtype in (None, torch.float32):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)

    def _views(self, tensors: dict[str, Tensor]) -> Vector:
        return {piece.name: _local(piece, tensors[piece.parameter]) for piece in self.component.pieces}

    def _check_losses(self) -> None:
        for what, samples in (("probe", self.probe), ("training data", self.data)):
            if not len(samples):
                raise PatterningError(f"{what}: there are no samples; give at least one")
        with torch.no_grad(), self._autocast():
            losses = self.per_sample_loss(self.model, self._batch(self.probe, np.arange(min(2, len(self.probe)))))
        if losses.dim() not in (1, 2) or len(losses) != min(2, len(self.probe)):
            raise PatterningError(
                f"the per-sample loss of a batch of {min(2, len(self.probe))} samples has shape {list(losses.shape)}; "
                "expected one row a sample, [sample] or [sample, position]"
            )
        if not torch.isfinite(losses).all():
            raise PatterningError("the per-sample loss is not finite at the checkpoint; mend the model or the data")


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; that class takes a second to import, which is for chain groups alone to pay."""
    return hasattr(tensor, "device_mesh")


def _rows(tensor: Tensor) -> tuple[int, int]:
    """Rows [start, stop) along axis 0 that this rank holds."""
    if not _is_sharded(tensor):
        return 0, tensor.shape[0] if tensor.dim() else 1
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0], offset[0] + shape[0]


def _overlap(piece: Piece, tensor: Tensor) -> tuple[int, int]:
    """Rows [start, stop) of the whole parameter that lie in the box and on this rank; empty: start = stop."""
    first, last = _rows(tensor)
    low, high = piece.box[0]
    start = min(max(first, low), high)
    return start, max(start, min(last, high))


def _extent(piece: Piece, tensor: Tensor) -> Extent:
    if not piece.box:  # a single number
        return 0, 1
    start, stop = _overlap(piece, tensor)
    low, high = piece.box[0]
    width = piece.num_coordinates // (high - low)
    return (start - low) * width, (stop - low) * width


def _local(piece: Piece, tensor: Tensor) -> Tensor:
    """This rank's part of a box, a view."""
    if not _is_sharded(tensor):
        return piece.view(tensor)
    start, stop = _overlap(piece, tensor)
    first, _ = _rows(tensor)
    local = tensor.to_local()
    if start == stop:
        return local[:0]
    rest = tuple(slice(a, b) for a, b in piece.box[1:])
    return local[(slice(start - first, stop - first), *rest)]


def _whole(value: Tensor) -> Tensor:
    """What a function of a sharded model's parameters gives is sharded itself."""
    return value.full_tensor() if _is_sharded(value) else value


def to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(part, device) for part in batch)
    return torch.as_tensor(batch).to(device)
