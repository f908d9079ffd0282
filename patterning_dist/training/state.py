"""The state of a chain or a training as bytes: safetensors with JSON, so that nothing is unpickled when it is read."""

from __future__ import annotations

import json
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from patterning_dist.errors import PatterningError


def encode(state: Any) -> bytes:
    """Tensors, numbers, text and None, in dicts, lists and tuples at any depth, as the bytes of a safetensors file.

    Tensors keep their bits; the floats of JSON are exact.

    Raises:
        PatterningError: something else is in it.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_strip(state, tensors))
    return save(tensors, {"tree": tree})


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
        # safetensors refuses tensors that share memory or are not contiguous.
        tensors[name] = value.detach().cpu().contiguous().clone()
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
