"""The weights of an engine where they lie: under ZeRO in pieces, put together one parameter at a time.

Where an engine computes in a narrower type, its weights are the float32 masters that its optimizer steps on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from patterning_dist.models.adapter import adapter_parameters
from patterning_dist.runtime.training.engine import partitioned_parameters
from patterning_dist.runtime.training.pieces import copy_overlap
from patterning_dist.storage.files import atomic_path
from patterning_dist.training.state import file_header, tensor_bytes


def save_weights(engine: Any, path: Path | None) -> None:
    """Write parameters, in float32, and persistent buffers to a safetensors file; all ranks call this.

    Args:
        engine: of DeepSpeed.
        path: of the file, on the rank that writes it; None on the others, which only take part in the gathering.
    """
    stored = _stored(engine)
    # Of the last forward pass, a parameter may still be on its way.
    with partitioned_parameters(engine):
        if path is not None:
            _write(stored, path)
            return
        for tensor in stored.values():
            with _whole(tensor):
                pass


def _write(stored: dict[str, Tensor], path: Path) -> None:
    shapes = {name: (_kind(tensor), getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in stored.items()}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(file_header(shapes, {"format": "pt"}))
        for tensor in stored.values():
            with _whole(tensor) as whole:
                file.write(tensor_bytes(whole.to(_kind(tensor))))


def own_share(engine: Any) -> dict[str, Tensor]:
    """The part of the parameters that this rank has a copy of in an average, by name, in float32 on the CPU.

    Under ZeRO stage 3 its piece of each, else every ``num_ranks``-th parameter: together the ranks copy each once. All
    ranks call this.
    """
    from deepspeed.utils import safe_get_local_fp32_param

    rank, num_ranks, shares = dist.get_rank(), dist.get_world_size(), {}
    for number, (name, p) in enumerate(engine.module.named_parameters()):
        if hasattr(p, "ds_tensor"):
            share = safe_get_local_fp32_param(p) if _has_master(p) else p.ds_tensor
        else:
            with _whole(p) as whole:
                share = whole if number % num_ranks == rank else None
        if share is not None:
            shares[name] = share.detach().to("cpu", torch.float32, copy=True)
    return shares


def add_to_share(engine: Any, share: dict[str, Tensor], other: dict[str, Tensor], rank: int) -> None:
    """Take over into ``share`` what this rank's part is of the share of a rank of another number of ranks."""
    for number, (name, p) in enumerate(engine.module.named_parameters()):
        if name not in other:
            continue
        if hasattr(p, "ds_tensor"):
            mine = share.setdefault(name, torch.zeros(p.ds_tensor.shape))
            copy_overlap(mine, dist.get_rank() * len(mine), other[name], rank * len(other[name]))
        elif number % dist.get_world_size() == dist.get_rank():
            share[name] = other[name]


def load_shares(engine: Any, shares: dict[str, Tensor]) -> None:
    """Put the shares of all ranks in place, for evaluating and saving; of the optimizer, masters alone follow."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    with partitioned_parameters(engine), torch.no_grad():
        for number, (name, p) in enumerate(engine.module.named_parameters()):
            if hasattr(p, "ds_tensor"):
                p.ds_tensor.copy_(shares[name])
                if _has_master(p):
                    safe_set_local_fp32_param(p, shares[name].to(p.device))
                continue
            whole = p.detach().to(torch.float32, copy=True)
            if name in shares:
                whole.copy_(shares[name])
            dist.broadcast(whole, src=number % dist.get_world_size())
            p.copy_(whole)
            if _has_master(p):
                safe_set_full_fp32_param(p, whole)


def _stored(engine: Any) -> dict[str, Tensor]:
    """What goes into a file: every parameter once, whatever names it has, and buffers; wide numbers first."""
    module = engine.module
    persistent = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
    found = dict(module.named_parameters()) | buffers
    if adapter := adapter_parameters(module):  # the base is where it was
        found = {name: found[name] for name in adapter}
    return dict(sorted(found.items(), key=lambda item: -_kind(item[1]).itemsize))


def _kind(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype.is_floating_point else tensor.dtype


def _has_master(p: Tensor) -> bool:
    """Whether a copy in float32 is stepped on in its place: so of what is narrow, in an engine that is."""
    kept = hasattr(p, "ds_id") or hasattr(p, "_hp_mapping")
    return kept and p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def _whole(tensor: Tensor) -> Iterator[Tensor]:
    """All of a tensor while it is entered; all ranks call this."""
    import deepspeed

    if _has_master(tensor):
        yield deepspeed.utils.safe_get_full_fp32_param(tensor)
    elif not hasattr(tensor, "ds_id"):
        yield tensor
    else:
        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor
