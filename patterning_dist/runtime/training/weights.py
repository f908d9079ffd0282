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
from torch import Tensor

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
            _whole(tensor, engine)
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
            file.write(_whole(tensor, engine).to(_kind(tensor)).contiguous().view(-1).view(torch.uint8).numpy())


def local_pieces(engine: Any) -> dict[str, Tensor]:
    """This rank's part of every parameter, by name, as it is kept."""
    return {name: getattr(p, "ds_tensor", p).detach() for name, p in engine.module.named_parameters()}


def local_copies(engine: Any) -> dict[str, Tensor]:
    """Copies of them on the CPU, in float32."""
    return {name: piece.to("cpu", torch.float32, copy=True) for name, piece in local_pieces(engine).items()}


def load_pieces(engine: Any, pieces: dict[str, Tensor]) -> None:
    """Put this rank's part of every parameter in place, for evaluating and saving; the optimizer keeps what it has."""
    with partitioned_parameters(engine), torch.no_grad():
        for name, piece in local_pieces(engine).items():
            piece.copy_(pieces[name])


def _stored(engine: Any) -> dict[str, Tensor]:
    """What goes into a file: every parameter once, whatever names it has, and buffers; wide numbers first."""
    module = engine.module
    persistent = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
    return dict(
        sorted({**dict(module.named_parameters()), **buffers}.items(), key=lambda item: -_kind(item[1]).itemsize)
    )


def _kind(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype.is_floating_point else tensor.dtype


def _whole(tensor: Tensor, engine: Any) -> Tensor:
    """All of a tensor on the CPU; all ranks call this."""
    with _gathered(tensor, engine):
        return tensor.detach().to("cpu", copy=True)


@contextlib.contextmanager
def _gathered(tensor: Tensor, engine: Any) -> Iterator[None]:
    if engine.zero_optimization_stage() < 3 or not hasattr(tensor, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        yield
