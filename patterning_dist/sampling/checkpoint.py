"""The state of a chain as bytes: safetensors, so that nothing is unpickled when it is read."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor


def encode(state: dict[str, Any], **extra: str) -> bytes:
    """``Chain.state_dict()`` as bytes; ``extra`` is text to be kept with it.

    Tensors keep their bits; numbers are kept as JSON, whose floats are exact.
    """
    tensors: dict[str, Tensor] = {"heat": state["heat"]}
    numbers: dict[str, Any] = {}
    for name, value in state["sampler"].items():
        if isinstance(value, dict):
            tensors |= {f"sampler/{name}/{piece}": tensor.detach().cpu() for piece, tensor in value.items()}
            numbers[name] = sorted(value)
        else:
            numbers[name] = value
    for name, statistic in state["statistics"].items():
        tensors |= {f"statistics/{name}/{key}": tensor.cpu() for key, tensor in statistic.items()}
    names = list(state["statistics"])
    header = {"sampler": numbers, "num_draws": state["num_draws"], "statistics": names, "extra": extra}
    # safetensors refuses tensors that share memory or are not contiguous.
    return save({n: t.contiguous().clone() for n, t in tensors.items()}, {"header": json.dumps(header)})


def decode(content: bytes, device: str | torch.device) -> tuple[dict[str, Any], dict[str, str]]:
    """The inverse of ``encode``: the state on a device, and the text."""
    tensors = {name: tensor.to(device) for name, tensor in load(content).items()}
    header = json.loads(_metadata(content)["header"])
    sampler = {
        name: {piece: tensors[f"sampler/{name}/{piece}"] for piece in value} if isinstance(value, list) else value
        for name, value in header["sampler"].items()
    }
    statistics: dict[str, dict[str, Tensor]] = {name: {} for name in header["statistics"]}
    for key, tensor in tensors.items():
        room, _, rest = key.partition("/")
        if room == "statistics":
            name, _, entry = rest.partition("/")
            statistics[name][entry] = tensor.cpu()
    state = {"sampler": sampler, "num_draws": header["num_draws"], "heat": tensors["heat"].cpu()}
    return state | {"statistics": statistics}, header["extra"]


def _metadata(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]
