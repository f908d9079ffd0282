"""The weights of an engine where they lie: under ZeRO stage 3 in pieces, put together one parameter at a time.

A safetensors file (https://github.com/huggingface/safetensors#format) is the length of a JSON header in 8 bytes, the
header, and the tensors end to end: it can be written while no process holds more than one of them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from patterning_dist.models.adapter import adapter_parameters
from patterning_dist.runtime.training.engine import partitioned_parameters
from patterning_dist.storage.files import atomic_path

_KINDS = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


def save_weights(engine: Any, path: Path | None) -> None:
    """Write parameters, in float32, and persistent buffers to a safetensors file; all ranks call this.

    Args:
        engine: of DeepSpeed.
        path: of the file, on the rank that writes it; None on the others, which only take part in the gathering.
    """
    stored = _stored(engine)
    if path is None:
        for tensor in stored.values():
            with _whole(tensor):
                pass
        return
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in stored.items():
        shape, kind = list(getattr(tensor, "ds_shape", tensor.shape)), _kind(tensor)
        begin, end = end, end + prod(shape) * kind.itemsize
        header[name] = {"dtype": _KINDS[kind], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in stored.values():
            with _whole(tensor):
                content = tensor.detach().to("cpu", _kind(tensor)).contiguous()
                file.write(content.view(-1).view(torch.uint8).numpy().data)


def own_share(engine: Any) -> dict[str, Tensor]:
    """The part of the parameters that this rank has a copy of in an average, by name, in float32 on the CPU.

    Under ZeRO stage 3 its piece of each, else every ``num_ranks``-th parameter: together the ranks copy each once.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    shares = {
        name: getattr(p, "ds_tensor", p)
        for number, (name, p) in enumerate(engine.module.named_parameters())
        if hasattr(p, "ds_tensor") or number % num_ranks == rank
    }
    return {name: share.detach().to("cpu", torch.float32, copy=True) for name, share in shares.items()}


def load_shares(engine: Any, shares: dict[str, Tensor]) -> None:
    """Put the shares of all ranks in place, for evaluating and saving; the optimizer keeps what it has."""
    with partitioned_parameters(engine), torch.no_grad():
        for number, (name, p) in enumerate(engine.module.named_parameters()):
            if hasattr(p, "ds_tensor"):
                p.ds_tensor.copy_(shares[name])
                continue
            if name in shares:
                p.copy_(shares[name])
            dist.broadcast(p.data, src=number % dist.get_world_size())


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


@contextlib.contextmanager
def _whole(tensor: Tensor) -> Iterator[None]:
    """All of a tensor in place while it is entered; all ranks call this."""
    if not hasattr(tensor, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        yield
