"""What passes of a model cost, found without weights: its own code runs on tensors that have a shape and no memory.

Whatever the code does is in the count: attention as it is computed, layers that are computed again in the backward
pass, copies in another type, logits and what the loss makes of them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from patterning_dist.errors import PatterningError, first_line
from patterning_dist.sampling.samples import Batch, PerSampleLoss, map_batch


@dataclass(frozen=True)
class Footprint:
    """Of one or several passes.

    Attributes:
        peak_bytes: the most that is alive at once of what the passes make; weights, whole gradients and inputs are not
            in it.
        flops: of matrix products, a multiplication and an addition each.
        num_operations: kernels started.
    """

    peak_bytes: int
    flops: float
    num_operations: int


def _grouped_flops(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Of a product of experts, or of their gradients: every row, once."""
    return 2 * a.numel() * b.shape[-1]


class _Live(TorchDispatchMode):
    """FLOPs of operations, and bytes of the memory behind tensors that they made and something still refers to."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.num_operations = self.flops = 0
        self._seen: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._grouped_mm.default:  # of experts; known in bfloat16 only
            found = function(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **(kwargs or {})).to(args[0].dtype)
        else:
            found = function(*args, **(kwargs or {}))
        self.num_operations += 1
        if (count := _FLOPS.get(function._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=found)
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen[storage] = None
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return found

    def _add(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


# torch's own counter keeps layers alive that are computed again.
_FLOPS = flop_registry | {torch.ops.aten._grouped_mm: _grouped_flops}


class Weightless:
    """A model whose tensors have no memory; its passes can be counted.

    Args:
        model: of any weights; they are replaced.
        losses: (model, batch) -> losses.
        compute_dtype: of forward passes under autocast, where it is not float32.
    """

    def __init__(self, model: nn.Module, losses: PerSampleLoss, compute_dtype: torch.dtype | None = None) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model, self._losses, self._compute_dtype = model.eval(), losses, compute_dtype
        if (config := getattr(model, "config", None)) is not None and hasattr(config, "_experts_implementation"):
            # Experts one after another take the rows that values send to them; in one product they are as many.
            config._experts_implementation = "grouped_mm"
        with self._mode:
            _without_memory(model)
        for parameter in model.parameters():  # one rank of several keeps its part of a gradient, and no whole one
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        model.requires_grad_(False)

    def forward(self, batch: Batch) -> Footprint:
        """A pass of some samples without gradients."""
        return self.counted(batch, lambda model, samples: self._forward(samples))

    def counted(self, batch: Batch, function: Callable[[nn.Module, Batch], object]) -> Footprint:
        """A function of the model and a batch, without gradients."""
        with torch.no_grad():
            return self._counted(batch, lambda samples: function(self.model, samples))

    def gradient(self, batch: Batch, moving: set[str]) -> Footprint:
        """Forward and backward, towards the parameters of these names; whole gradients go as soon as they are there."""
        with self._towards(moving):
            return self._counted(batch, lambda samples: self._forward(samples).sum().backward())

    def hessian_product(self, batch: Batch, moving: set[str]) -> Footprint:
        """The exact product of ``Target.hessian_product``; whole gradients, which it keeps, are in its peak."""

        def product(samples: Batch) -> None:
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
            first = torch.autograd.grad(self._forward(samples).sum(), parameters, create_graph=True, **options)
            along = torch.stack([g.sum() for g in first]).sum()
            torch.autograd.grad(along, parameters, **options)

        with self._towards(moving):
            return self._counted(batch, product)

    def _forward(self, batch: Batch) -> Tensor:
        if self._compute_dtype in (None, torch.float32):
            return self._losses(self.model, batch).float()
        with torch.autocast("cpu", self._compute_dtype):
            return self._losses(self.model, batch).float()

    def _counted(self, batch: Batch, call: Callable[[Batch], object]) -> Footprint:
        with self._mode:
            samples = map_batch(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype), batch)
        inputs = [leaf for leaf in tree_leaves(samples) if isinstance(leaf, Tensor)]
        live = _Live([*self.model.parameters(), *self.model.buffers(), *inputs])
        try:
            with self._mode, live:
                call(samples)
        except RuntimeError as error:  # of tensors without values
            raise PatterningError(
                f"model: a pass of {type(self.model).__name__} cannot be counted without weights "
                f"({first_line(error)}); plan without --gpus where the weights are"
            ) from None
        return Footprint(live.peak, float(live.flops), live.num_operations)

    @contextlib.contextmanager
    def _towards(self, moving: set[str]) -> Iterator[None]:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in moving)
        yield
        self.model.requires_grad_(False)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _without_memory(model: nn.Module) -> None:
    """Every parameter and buffer replaced by one of the same shape and type; what was shared stays shared."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[tensor] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
                tensors[name] = made[tensor]  # type: ignore[assignment]  # parameters stay parameters
