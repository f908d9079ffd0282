"""What a chain walks on: a model at a checkpoint w*, of which one component may move.

A model takes part through one function, the losses of a batch of samples. It may be whole on one device or sharded over
the ranks of a chain group: minibatches and probe are shared out over the ranks, and a mean is always that of all of
them. Where the model can be cut around the component, what does not move is computed once for samples that come again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from patterning_dist.errors import PatterningError
from patterning_dist.heartbeat import beat
from patterning_dist.models.components import Component, Vector, num_bytes
from patterning_dist.sampling.layered import Layered, Prepared, State
from patterning_dist.sampling.noise import Extent
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samples import Batch, PerSampleLoss, Samples, micro_batches, to_device
from patterning_dist.sampling.shard import is_sharded, local_part, piece_extent

CACHE_BYTES = 1 << 30


class Measurement(NamedTuple):
    """What a draw measures, absolute, float64 on the CPU, in nats.

    ``observables`` [observable]; ``losses`` [probe column]: every probe entry that counts, then, where a sample has
    several, the mean of every sample; ``mean_loss`` L(w) of the chain's own posterior, on the probe entries.
    """

    observables: Tensor
    losses: Tensor
    mean_loss: float


class Target:
    """A model as a function of the free coordinates of one component.

    On a chain group every rank holds one over its part of the model, and all ranks call the methods together.

    Args:
        model: at w*, float32; its parameters become this object's working copy. On several ranks: sharded on axis 0 by
            ``sampling.shard.shard_model``.
        component: what may move.
        losses: (model, batch) -> losses [sample] or [sample, position] in nats, differentiable, 0 where not counted.
        data: training samples of the minibatches.
        probe: samples whose losses are recorded.
        held_out: samples of the split losses phi_k = sum coefficients[k] * losses.
        coefficients: [observable, held-out sample(, position)].
        functions: the user's observables, model -> Tensor [k]; they come last.
        num_component_losses: how many observables are the probe's mean loss itself; they come first.
        layered: the model cut around the component.
        cache_bytes: what ``layered`` computes is kept up to this size, half of it for probe and held-out samples, half
            for others that are prepared; beyond it passes are whole ones [bytes].
        counted: probe entries that count [sample, position]; None: all.
        loss_weights: of the probe entries in the chain's own mean loss, their plain mean where None; the component
            losses among the observables are the plain mean in either case [sample(, position)].
        mean_counted: entries of a training sample that count, on average over ``data``; None: all of them.
        weight_decay: c. The chain's own loss, whose minimum w* is, is then L(w) + c/2 |w|^2 over the free coordinates:
            ``gradient``, ``hessian_product``, the mean loss and the component losses are of that [1 / weight^2].
        micro_batch_size: samples that one forward pass takes at most.
        compute_dtype: of the forward pass under autocast; the sampled weights stay float32.
        ranks: the chain group.

    Attributes:
        name: of the component.
        center: w*, piece name -> this rank's free coordinates, float32.
        extents: piece name -> flat elements [start, stop) of the whole piece that this rank holds.
        totals: piece name -> number of elements of the whole piece, on all ranks.

    Raises:
        PatterningError: parameters that are not float32, or losses of a wrong shape or not finite at w*.
    """

    def __init__(
        self,
        model: nn.Module,
        component: Component,
        losses: PerSampleLoss,
        data: Samples,
        probe: Samples,
        *,
        held_out: Samples | None = None,
        coefficients: Tensor | None = None,
        functions: tuple[Callable[[nn.Module], Tensor], ...] = (),
        num_component_losses: int = 0,
        layered: Layered | None = None,
        cache_bytes: int = CACHE_BYTES,
        counted: np.ndarray | None = None,
        loss_weights: np.ndarray | None = None,
        mean_counted: float | None = None,
        weight_decay: float = 0.0,
        micro_batch_size: int = 16,
        compute_dtype: torch.dtype | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.component, self._losses = model.eval().requires_grad_(False), component, losses
        self.data, self.layered, self.mean_counted, self.weight_decay = data, layered, mean_counted, weight_decay
        self.functions, self.num_component_losses = functions, num_component_losses
        self.micro_batch_size, self.compute_dtype, self.cache_bytes = micro_batch_size, compute_dtype, cache_bytes
        self.name, self.ranks = component.name, ranks or Ranks()
        self._moving = _moving(model, component)
        self.device = next(iter(self._moving.values())).device
        self.totals = {piece.name: piece.num_coordinates for piece in component.pieces}
        self.extents: dict[str, Extent] = {
            piece.name: piece_extent(piece, self._moving[piece.parameter]) for piece in component.pieces
        }
        self.center = {name: w.clone() for name, w in self.live().items()}
        self._check_losses(probe)
        recorded = len(probe) + (0 if held_out is None else len(held_out))
        self.probe = self._kept(probe, np.arange(len(probe)), cache_bytes // 2 // recorded)
        self.counted = None if counted is None else torch.from_numpy(counted)
        self.loss_weights = None if loss_weights is None else torch.from_numpy(loss_weights)
        self.held_out: Prepared | None = None
        if held_out is not None:
            self.held_out = self._kept(held_out, np.arange(len(held_out)), cache_bytes // 2 // recorded)
        self.coefficients = coefficients

    def live(self) -> Vector:
        """The coordinates themselves: views into the model's parameters, this rank's part of each piece."""
        return self._views({name: p.detach() for name, p in self._moving.items()})

    def move_to(self, position: Mapping[str, Tensor]) -> None:
        """Move the component to ``position``, this rank's part of each piece."""
        for name, w in self.live().items():
            w.copy_(position[name])

    def gradient(self, ids: np.ndarray) -> tuple[float, Vector]:
        """Mean loss of the training samples ``ids`` in nats, and its gradient, with that of weight decay.

        With entries that do not count, the sum over the minibatch is divided by the number expected in as many
        samples: a ratio of two random sums would be biased.
        """
        room = 0 if self.layered is not None and self.layered.pays_once else None
        loss, gradient = self.mean_gradient(Prepared(self._parts(self.data, ids, room), len(ids)), self.mean_counted)
        return loss, self._decayed(gradient, self.live())

    def gradient_here_and_at_center(self, ids: np.ndarray) -> tuple[float, Vector, Vector]:
        """``gradient``, and the gradient at w* for the same samples; the component is left where it is, to the bit."""
        samples = Prepared(list(self._parts(self.data, ids)), len(ids))
        loss, here = self.mean_gradient(samples, self.mean_counted)
        kept = {name: w.clone() for name, w in self.live().items()}
        self.move_to(self.center)
        there = self.mean_gradient(samples, self.mean_counted)[1]
        self.move_to(kept)
        return loss, self._decayed(here, kept), self._decayed(there, self.center)

    def mean_gradient(self, samples: Prepared, mean_counted: float | None = None) -> tuple[float, Vector]:
        """Mean loss of samples in nats, and its gradient with respect to the free coordinates."""
        total = torch.zeros((), dtype=torch.float64)
        for batch, state, count in samples.parts:
            losses = self._batch_losses(batch, state)
            per_sample = losses.numel() / len(losses) if mean_counted is None else mean_counted
            loss = losses.sum() * (bool(count) / (per_sample * samples.num_samples))
            loss.backward()
            total += loss.detach().double().cpu()
        return self.ranks.sum(total).item(), self._take_gradient()

    def split_gradients(self) -> list[Vector]:
        """Gradients of the split losses with respect to the free coordinates."""
        assert self.held_out is not None and self.coefficients is not None
        return self.sum_gradients(self.held_out, self.coefficients)

    def sum_gradients(self, samples: Prepared, coefficients: Tensor) -> list[Vector]:
        """Gradients of the sums of coefficients[k] * losses over samples, one for every k."""
        gradients, first = [self._zeros() for _ in coefficients], self.ranks.share(samples.num_samples)[0]
        for batch, state, count in samples.parts:
            part = coefficients[:, first : first + count].to(self.device, torch.float32)
            first += count
            wanted = [k for k in range(len(part)) if part[k].any()]
            # A sharded model drops what it gathered in a backward pass: every observable takes a forward pass there,
            # and all ranks take part in every one.
            wanted = wanted if self.ranks.size == 1 else list(range(len(part)))
            losses = self._batch_losses(batch, state) if self.ranks.size == 1 else None
            for k in wanted:
                values = self._batch_losses(batch, state) if losses is None else losses
                (part[k] * values[:count]).sum().backward(retain_graph=losses is not None and k != wanted[-1])
                for name, g in self._take_gradient().items():
                    gradients[k][name] += g
        return gradients

    def observable_gradient(self, number: int) -> Vector:
        """Gradient of a split loss or of a number that a user's function returns, ``number`` as in ``measure``.

        Raises:
            PatterningError: the function's number has none.
        """
        number -= self.num_component_losses
        if self.coefficients is not None:
            if number < len(self.coefficients):
                return self.split_gradients()[number]
            number -= len(self.coefficients)
        with self._autocast():
            value = [entry for f in self.functions for entry in _whole(f(self.model)).reshape(-1)][number]
        if not value.requires_grad:
            raise PatterningError(f"function {number} of the observables has no gradient, which its control needs")
        value.backward()
        return self._take_gradient()

    def hessian_product(self, samples: Prepared, vector: Mapping[str, Tensor]) -> Vector:
        """H v of the mean loss over samples, H over the free coordinates; of weight decay c v is added.

        On one rank exact (Pearlmutter, 1994: d/dw (g . v)); on several the central difference of gradients
        [g(w + s u) - g(w - s u)] |v| / 2s, u = v / |v|, s = |w| / 1000, which needs nothing of a model but its
        gradient.
        """
        return self._decayed(self._hessian_product(samples, vector), vector)

    def _hessian_product(self, samples: Prepared, vector: Mapping[str, Tensor]) -> Vector:
        if self.ranks.size == 1:
            return self._exact_hessian_product(samples, vector)
        position = {name: w.clone() for name, w in self.live().items()}
        norm = self.dot(vector, vector) ** 0.5
        if norm == 0.0:
            return self._zeros()
        length = 1e-3 * self.dot(position, position) ** 0.5 / norm
        sides = []
        for sign in (1.0, -1.0):
            self.move_to({name: w + sign * length * vector[name] for name, w in position.items()})
            sides.append(self.mean_gradient(samples, self.mean_counted)[1])
        self.move_to(position)
        return {name: (sides[0][name] - sides[1][name]) / (2 * length) for name in sides[0]}

    def dot(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
        """Inner product of two vectors of free coordinates, over all ranks."""
        local = sum(((a[name].double() * b[name].double()).sum().cpu() for name in a), torch.zeros(()).double())
        return self.ranks.sum(local).item()

    def measure(self) -> Measurement:
        """Observables and probe losses at the present position."""
        with torch.no_grad():
            probe = self.losses(self.probe)
            columns, mean = self.columns(probe)
            own = mean if self.loss_weights is None else self.columns(probe * self.loss_weights)[1]
            penalty = self.weight_decay and self.weight_decay / 2 * self.dot(self.live(), self.live())
            observables = [(mean + penalty).expand(self.num_component_losses)]
            if self.held_out is not None and self.coefficients is not None:
                held_out = self.losses(self.held_out)
                observables.append((self.coefficients.double() * held_out).flatten(1).sum(dim=1))
            with self._autocast():
                observables += [_whole(f(self.model)).double().cpu().reshape(-1) for f in self.functions]
        return Measurement(torch.cat(observables), columns, own.item() + penalty)

    def columns(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of the probe, or their derivatives, as probe columns; and the mean over the entries that count."""
        if losses.dim() == 1:
            return losses, losses.mean()
        if self.counted is None:
            return torch.cat([losses.flatten(), losses.mean(dim=1)]), losses.mean()
        entries = losses[self.counted]
        return torch.cat([entries, (losses * self.counted).sum(dim=1) / self.counted.sum(dim=1)]), entries.mean()

    def prepare(self, samples: Samples, ids: np.ndarray | None = None) -> Prepared:
        """This rank's part of samples, with what does not move computed; all ranks call this."""
        ids = np.arange(len(samples)) if ids is None else ids
        return self._kept(samples, ids, self.cache_bytes // 2 // max(1, len(ids)))

    def losses(self, samples: Prepared) -> Tensor:
        """Losses of all samples at the present position, float64 on the CPU, the same on every rank."""
        with torch.no_grad():
            parts = [self._batch_losses(batch, state)[:count] for batch, state, count in samples.parts]
        return self.ranks.gather(torch.cat(parts), samples.num_samples).double().cpu()

    def _kept(self, samples: Samples, ids: np.ndarray, room: int) -> Prepared:
        """Samples with their states, or without where those take more than ``room`` bytes a sample.

        By sizes alone, so that a pass takes the same way whatever was computed before it.
        """
        parts = self._parts(samples, ids, room)
        if (first := next(parts, None)) is None:
            return Prepared([], len(ids))
        _, state, count = first
        if state is not None and num_bytes(state) > room * max(1, count):
            return Prepared(list(self._parts(samples, ids, None)), len(ids))
        return Prepared([first, *parts], len(ids))

    def _parts(
        self, samples: Samples, ids: np.ndarray, room: int | None = 0
    ) -> Iterator[tuple[Batch, State | None, int]]:
        """Micro-batches, with states of at most ``room`` bytes a sample where that can be chosen; None: without."""
        for part, counts in micro_batches(ids, self.ranks, self.micro_batch_size):
            batch = to_device(samples[torch.from_numpy(part)], self.device)
            state = None
            if self.layered is not None and room is not None:
                with torch.no_grad(), self._autocast():
                    state = self.layered.below(batch, room * len(part))
            yield batch, state, len(part) if counts else 0

    def _batch_losses(self, batch: Batch, state: State | None) -> Tensor:
        beat()
        with self._autocast():
            if self.layered is not None and state is not None:
                return self.layered.above(state, batch).float()
            return self._losses(self.model, batch).float()

    def _exact_hessian_product(self, samples: Prepared, vector: Mapping[str, Tensor]) -> Vector:
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            return self._pearlmutter(samples, vector)

    def _pearlmutter(self, samples: Prepared, vector: Mapping[str, Tensor]) -> Vector:
        total, parameters = self._zeros(), list(self._moving.values())
        for batch, state, _ in samples.parts:
            losses = self._batch_losses(batch, state)
            per_sample = losses.numel() / len(losses) if self.mean_counted is None else self.mean_counted
            loss = losses.sum() / (per_sample * samples.num_samples)
            first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
            gradient = self._views(dict(zip(self._moving, first, strict=True)))
            directional = torch.stack([(g * vector[name]).sum() for name, g in gradient.items()]).sum()
            second = torch.autograd.grad(directional, parameters, allow_unused=True, materialize_grads=True)
            for name, product in self._views(dict(zip(self._moving, second, strict=True))).items():
                total[name] += product
        return total

    def _take_gradient(self) -> Vector:
        """What backward passes have left, and nothing of it is kept.

        A parameter that the loss did not reach has no gradient; its coordinates move by the prior alone.
        """
        gradient = self._views(
            {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self._moving.items()}
        )
        for parameter in self._moving.values():
            parameter.grad = None
        return gradient

    def _decayed(self, gradient: Vector, position: Mapping[str, Tensor]) -> Vector:
        if not self.weight_decay:
            return gradient
        return {name: g.add(position[name], alpha=self.weight_decay) for name, g in gradient.items()}

    def _zeros(self) -> Vector:
        return {name: torch.zeros_like(w) for name, w in self.center.items()}

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.compute_dtype in (None, torch.float32):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)

    def _views(self, tensors: Mapping[str, Tensor]) -> Vector:
        return {piece.name: local_part(piece, tensors[piece.parameter]) for piece in self.component.pieces}

    def _check_losses(self, probe: Samples) -> None:
        for what, samples in (("probe", probe), ("training data", self.data)):
            if not len(samples):
                raise PatterningError(f"{what}: there are no samples; give at least one")
        number = min(2, len(probe))
        with torch.no_grad(), self._autocast():
            losses = self._losses(self.model, to_device(probe[torch.arange(number)], self.device))
        if losses.dim() not in (1, 2) or len(losses) != number:
            raise PatterningError(
                f"the per-sample loss of a batch of {number} samples has shape {list(losses.shape)}; "
                "expected one row a sample, [sample] or [sample, position]"
            )
        if not torch.isfinite(losses).all():
            raise PatterningError("the per-sample loss is not finite at the checkpoint; mend the model or the data")


def _moving(model: nn.Module, component: Component) -> dict[str, nn.Parameter]:
    """The parameters that the component touches, which take gradients from now on."""
    parameters = dict(model.named_parameters())
    moving = {name: parameters[name] for name in component.parameters}
    for name, parameter in moving.items():
        if parameter.dtype != torch.float32:
            raise PatterningError(
                f"parameter {name} is {parameter.dtype}; sampled weights must be float32, since smaller types "
                "swallow the steps: load the model in float32 and set compute_dtype instead"
            )
        parameter.requires_grad_(True)
    return moving


def _whole(value: Tensor) -> Tensor:
    """What a function of a sharded model's parameters gives is sharded itself."""
    return value.full_tensor() if is_sharded(value) else value
