"""The state of a chain or a training as bytes: safetensors with JSON, so that nothing is unpickled when it is read.

A safetensors file (https://github.com/huggingface/safetensors#format) is the length of a JSON header in 8 bytes, the
header, and the tensors end to end: it can be written while no process holds more than one of them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from patterning_dist.errors import PatterningError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def encode(state: Any) -> bytes:
    """Tensors, numbers, text and None, in dicts, lists and tuples at any depth, as the bytes of a safetensors file.

    Tensors keep their bits; the floats of JSON are exact.

    Raises:
        PatterningError: something else is in it.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_strip(state, tensors))
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    buffer = io.BytesIO()  # whose contents are handed out without a copy: of a large state there is one
    buffer.write(file_header({name: (t.dtype, t.shape) for name, t in tensors.items()}, {"tree": tree}))
    for tensor in tensors.values():
        buffer.write(tensor_bytes(tensor))
    return buffer.getvalue()


def file_header(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with; the bytes of its tensors follow in this order, wide numbers first.

    Args:
        tensors: type and shape by name.
        metadata: of the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as they lie in a file."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def decode(content: bytes) -> Any:
    """The inverse of ``encode``, its tensors on the CPU; None for a safetensors file that it did not write."""
    tensors = load(content)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return _dress(json.loads(header.get("__metadata__", {}).get("tree", "null")), tensors)


def _strip(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The JSON of a value, whose tensors move to ``tensors``."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return ["tensor", name]
    if isinstance(value, dict):  # keys may be numbers, which JSON would turn into text
        return ["dict", [[key, _strip(entry, tensors)] for key, entry in value.items()]]
    if isinstance(value, list | tuple):
        return ["tuple" if isinstance(value, tuple) else "list", [_strip(entry, tensors) for entry in value]]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise PatterningError(
        f"the state holds a {type(value).__name__}, which a checkpoint cannot; of a training, take the DeepSpeed "
        "feature that needs it out of the DeepSpeed JSON; of a statistic, keep it as a tensor"
    )


def _dress(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _dress(entry, tensors) for key, entry in content}
    entries = [_dress(entry, tensors) for entry in content]
    return tuple(entries) if kind == "tuple" else entries
