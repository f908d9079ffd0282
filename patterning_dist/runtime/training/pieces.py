"""What ZeRO shares out of an optimizer over the ranks, told by parameters: any number of ranks can take it up.

Every rank steps on flat float32 masters, in which a piece of each parameter lies, or none; the optimizer's state lies
alike. Saved are the pieces, with where they begin in the flattened parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from patterning_dist.errors import PatterningError

_WEIGHT = "weight"  # among the names of the optimizer's state


class Piece(NamedTuple):
    """This rank's part of a trained parameter.

    Attributes:
        name: of the parameter.
        flat: masters that it lies in.
        offset: where it begins in them.
        start: where it begins in the flattened parameter.
        size: numbers, 0 where this rank has none.
    """

    name: str
    flat: Tensor
    offset: int
    start: int
    size: int


def pieces(engine: Any) -> Iterator[Piece]:
    """Of all trained parameters, under ZeRO stage 1 to 3."""
    optimizer, rank = engine.optimizer, dist.get_rank()
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            continue
        if hasattr(p, "ds_id"):
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
            start = rank * size
            yield Piece(name, _flats(engine)[group], offset, start, max(0, min(size, p.ds_numel - start)))
        elif (found := getattr(p, "_hp_mapping", None)) is not None:
            there, here = found.hp_fragment_address, found.lp_fragment_address
            yield Piece(name, _flats(engine)[found.param_group_index], there.start, here.start, here.numel)


def _flats(engine: Any) -> list[Tensor]:
    """This rank's masters, one tensor a group; every optimizer of DeepSpeed has a name of its own for them."""
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    return next(getattr(engine.optimizer, name) for name in names if hasattr(engine.optimizer, name))


def optimizer_pieces(engine: Any) -> dict[str, Any]:
    """This rank's masters and optimizer state: tensors by parameter, and numbers such as the step, alike for all."""
    found: dict[str, Any] = {}
    numbers: dict[str, Any] = {}
    for name, flat, offset, start, size in pieces(engine):
        state = engine.basic_optimizer.state.get(flat, {})
        alike = {key: value for key, value in state.items() if _is_alike(value, flat)}
        numbers = {key: value for key, value in state.items() if key not in alike}
        if size:
            tensors = {key: value.narrow(0, offset, size) for key, value in {_WEIGHT: flat, **alike}.items()}
            found[name] = {"start": start, "tensors": tensors}
    return {"pieces": found, "numbers": numbers}


def _is_alike(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape


def load_optimizer_pieces(engine: Any, saved: Iterable[dict[str, Any]]) -> None:
    """Put in place what ``optimizer_pieces`` gave on each of some ranks, as many as they were.

    Raises:
        PatterningError: a piece of a parameter is in none of them.
    """
    optimizer, mine = engine.basic_optimizer, list(pieces(engine))
    filled = dict.fromkeys((piece.name for piece in mine), 0)
    with torch.no_grad():
        for part in saved:
            for name, flat, offset, start, size in mine:
                there = part["pieces"].get(name, {"start": 0, "tensors": {}})
                for key, value in there["tensors"].items():
                    target = flat
                    if key != _WEIGHT:
                        target = optimizer.state[flat].setdefault(key, torch.zeros_like(flat))
                    number = copy_overlap(target.narrow(0, offset, size), start, value, there["start"])
                    filled[name] += number if key == _WEIGHT else 0
            for flat in _flats(engine):
                for key, value in part["numbers"].items():
                    optimizer.state[flat][key] = value.clone() if isinstance(value, Tensor) else value
        for name, flat, offset, _, size in mine:
            p = engine.module.get_parameter(name)
            if hasattr(p, "ds_tensor"):
                p.ds_tensor[:size].copy_(flat.narrow(0, offset, size))
    if lacking := [piece.name for piece in mine if filled[piece.name] != piece.size]:
        raise PatterningError(f"a training checkpoint lacks a part of {lacking[0]}; delete it to begin again")


def copy_overlap(target: Tensor, start: int, source: Tensor, source_start: int) -> int:
    """Copy what two stretches of one flat tensor share; returns how many numbers that is."""
    first, last = max(start, source_start), min(start + len(target), source_start + len(source))
    if first < last:
        target[first - start : last - start].copy_(source[first - source_start : last - source_start])
    return max(0, last - first)
