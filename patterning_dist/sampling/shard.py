"""A model laid out over the ranks of a chain group, so that each holds about 1/G of every parameter.

FSDP2 (``torch.distributed.fsdp.fully_shard``) cuts each parameter along axis 0; the parts are put together for one
layer at a time, in the forward pass and again in the backward pass, and gradients are summed back into the parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from patterning_dist.errors import PatterningError
from patterning_dist.models.components import Piece
from patterning_dist.sampling.noise import Extent
from patterning_dist.sampling.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shard_model(
    model: nn.Module, ranks: Ranks, device: torch.device | str, *, compute_dtype: torch.dtype | None = None
) -> nn.Module:
    """Cut every parameter, frozen or not, into ``ranks.size`` parts along axis 0; the same module, changed in place.

    Gradients are summed over the ranks, not averaged: what a rank adds is its share of the mean over the whole
    minibatch. All ranks must run the forward and backward passes of the model together, through the model itself.

    Args:
        model: the same on every rank; parameters may lie on the meta device, to be filled afterwards.
        ranks: the chain group; one rank keeps the model whole.
        device: where this rank computes.
        compute_dtype: of the forward pass under autocast, if any. Autograd keeps autocast's copies of all weights from
            the forward to the backward pass, on every rank: the layers are then computed again in the backward pass.

    Raises:
        PatterningError: a parameter has no axis to cut along.
    """
    if ranks.size == 1:
        return model.to(device)
    from torch.distributed.fsdp import FSDPModule, fully_shard  # takes a second to import

    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise PatterningError(
                f"parameter {name} is a single number without an axis and cannot be cut over {ranks.size} ranks; "
                "give it the shape [1], or use one rank a chain"
            )
        parameter.data = parameter.data.contiguous()
    layers = list(decoder_layers(model))
    if layers and compute_dtype not in (None, torch.float32):
        checkpoint_layers(model)
    mesh = init_device_mesh(torch.device(device).type, (ranks.size,))
    for module in [*layers, *_untied_embeddings(model), model]:
        # True for the root as well: what lies outside the layers would otherwise stay whole until the backward pass,
        # and for good where there is none.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gloo has no average, and the sum is what is wanted.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def checkpoint_layers(model: nn.Module) -> nn.Module:
    """Keep the inputs of layers for the backward pass and compute the rest again; the same module, changed in place.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016. Each forward pass of a layer is taken twice;
    values and gradients are the same.

    Raises:
        PatterningError: there are no layers.
    """
    check_layers(model)
    for layer in decoder_layers(model):
        if not isinstance(layer.forward, partial):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return model


def check_layers(model: nn.Module) -> None:
    """Refuse to compute layers again where there are none.

    Raises:
        PatterningError: there are none.
    """
    if not list(decoder_layers(model)):
        raise PatterningError(
            f"gradient_checkpointing: {type(model).__name__} has no layers in an nn.ModuleList; remove the key"
        )


def sharded_units(model: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters that ``shard_model`` puts together at once: of every layer and embedding, and of what is left."""
    units = [list(module.parameters()) for module in [*decoder_layers(model), *_untied_embeddings(model)]]
    inside = {p for unit in units for p in unit}
    return [*units, [p for p in model.parameters() if p not in inside]]


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of every ``nn.ModuleList`` that lies in no other one: each is put together by itself.

    A layer that shares a parameter with the rest of the model is left out: it stays with the root.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for name, layers in lists.items():
        if not any(name.startswith(f"{other}.") for other in lists):
            yield from (layer for layer in layers if _owns_its_parameters(layer, model))


def _untied_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """Input and output embedding of a language model of ``transformers``: as large as several layers, often."""
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter, lambda: None)()
        if module is not None and _owns_its_parameters(module, model):
            yield module


def _owns_its_parameters(part: nn.Module, model: nn.Module) -> bool:
    mine, all_uses = (Counter(p for _, p in m.named_parameters(remove_duplicate=False)) for m in (part, model))
    return bool(mine) and all(all_uses[parameter] == count for parameter, count in mine.items())


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor; that class takes a second to import, which is for chain groups alone to pay."""
    return hasattr(tensor, "device_mesh")


def piece_extent(piece: Piece, tensor: Tensor) -> Extent:
    """Flat elements [start, stop) of a piece that this rank holds."""
    if not piece.box:  # a single number
        return 0, 1
    start, stop = _overlap(piece, tensor)
    low, high = piece.box[0]
    width = piece.num_coordinates // (high - low)
    return (start - low) * width, (stop - low) * width


def local_part(piece: Piece, tensor: Tensor) -> Tensor:
    """This rank's part of a box of a parameter, a view."""
    if not is_sharded(tensor):
        return piece.view(tensor)
    start, stop = _overlap(piece, tensor)
    first, _ = _rows(tensor)
    local = tensor.to_local()
    if start == stop:
        return local[:0]
    rest = tuple(slice(a, b) for a, b in piece.box[1:])
    return local[(slice(start - first, stop - first), *rest)]


def _rows(tensor: Tensor) -> tuple[int, int]:
    """Rows [start, stop) along axis 0 that this rank holds."""
    if not is_sharded(tensor):
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
