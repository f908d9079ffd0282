"""Reading a model's parameters from files, however it is laid out.

A rank reads the rows that it holds: of a model cut by FSDP2, of one in the pieces of ZeRO stage 3, or of a whole one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from patterning_dist.errors import PatterningError
from patterning_dist.models.checkpoint import Files
from patterning_dist.models.weights import Source, state_shapes

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedModel


def fill(model: PreTrainedModel, sources: list[Source], device: torch.device | str) -> None:
    """Read this rank's part of every parameter, in float32, and the persistent buffers that the files have.

    Args:
        model: with parameters that have no memory yet, cut by ``fully_shard`` or not, or in the pieces of ZeRO stage 3.
            All ranks that hold pieces call this together.
        sources: see ``match``.
        device: where whole parameters go.

    Raises:
        PatterningError: weights that are NaN or infinite, on all ranks alike.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    parameters, buffers = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_buffers())
    shapes, files, done = state_shapes(model), Files(), set[int]()
    rows = {name: _rows(parameters[name]) if name in parameters else (0, None) for name in shapes}
    state: dict[str, Tensor] = {}
    problem = None
    for source in sources:
        for name, tensor in source.read(files, shapes, rows, model.config).items():
            if name in buffers:
                buffers[name].copy_(tensor)
            elif name in parameters and id(parameter := parameters[name]) not in done:
                done.add(id(parameter))
                problem = problem or _problem(source, tensor, files)
                if hasattr(parameter, "ds_tensor"):
                    _fill_piece(parameter, tensor)
                else:
                    filled = nn.Parameter(_laid_out(parameter, tensor, device), requires_grad=parameter.requires_grad)
                    state |= dict.fromkeys(aliases[id(parameter)], filled)
    if any(map(_in_pieces, parameters.values())):
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        problem = next(filter(None, problems), None)
    if problem is not None:
        raise PatterningError(f"{problem}, of which no loss can be computed; take another checkpoint")
    # Assigned, not copied: the parameters of the module have no memory yet. fully_shard pads uneven parts in a hook.
    model.load_state_dict(state, strict=False, assign=True)


def _problem(source: Source, tensor: Tensor, files: Files) -> str | None:
    """What is wrong with numbers that were read, and with which tensor of the files."""
    stored = [one for _, one in source.stored]
    if not tensor.is_floating_point():
        return f"{stored[0].path}: {stored[0].key} holds {tensor.dtype}, codes of a quantised model"
    if torch.isfinite(tensor.float()).all():
        return None
    one = next((one for one in stored if not torch.isfinite(one.read(files).float()).all()), stored[0])
    return f"{one.path}: {one.key} holds NaN or infinite weights"


def _in_pieces(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_tensor") or hasattr(parameter, "device_mesh")


def _rows(parameter: Any) -> tuple[int, int | None]:
    """Rows along axis 0 that this rank needs."""
    if hasattr(parameter, "ds_tensor"):
        start, stop = _flat_range(parameter)
        width = math.prod(parameter.ds_shape[1:])
        return start // width, -(-stop // width)
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        return offset[0], offset[0] + shape[0]
    return 0, None


def _flat_range(parameter: Any) -> tuple[int, int]:
    """Elements of a parameter, row by row, that are this rank's piece under ZeRO stage 3."""
    size, whole = parameter.ds_tensor.numel(), parameter.ds_numel
    start = min(dist.get_rank(parameter.ds_process_group) * size, whole)
    return start, min(start + size, whole)


def _fill_piece(parameter: Any, rows: Tensor) -> None:
    start, stop = _flat_range(parameter)
    skipped = start - _rows(parameter)[0] * math.prod(parameter.ds_shape[1:])
    parameter.ds_tensor.view(-1)[: stop - start].copy_(rows.reshape(-1)[skipped : skipped + stop - start])


def _laid_out(parameter: Any, rows: Tensor, device: torch.device | str) -> Tensor:
    """Like ``parameter``, in float32."""
    if not hasattr(parameter, "device_mesh"):
        return rows.to(device, torch.float32, copy=True)
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    local = rows.to(mesh.device_type, torch.float32, copy=True)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
