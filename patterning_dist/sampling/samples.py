"""Samples addressed by number, batches of any shape (a tensor, or tuples and dicts), and their losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from patterning_dist.heartbeat import beat
from patterning_dist.sampling.ranks import Ranks

Batch = Any  # a tensor whose first axis is the sample, or a tuple, list or mapping of such
PerSampleLoss = Callable[[nn.Module, Batch], Tensor]  # losses [sample] or [sample, position], nats


class Samples(Protocol):
    """``len()``, and ids [sample] -> a batch. A ``TensorDataset`` is one."""

    def __len__(self) -> int: ...
    def __getitem__(self, ids: Any) -> Batch: ...


class Part:
    """The samples ``ids`` of a set, renumbered from 0."""

    def __init__(self, samples: Samples, ids: np.ndarray) -> None:
        self.samples, self.ids = samples, torch.from_numpy(np.asarray(ids, np.int64))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, ids: Tensor) -> Batch:
        return self.samples[self.ids[ids]]


class Joined:
    """Several sets end to end; batches are asked for in ascending order of their numbers."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, ids: Tensor) -> Batch:
        batches = []
        for part, start, stop in zip(self.parts, self.starts, self.starts[1:], strict=False):
            mine = ids[(ids >= start) & (ids < stop)] - start
            if len(mine):
                batches.append(part[mine])
        return _concatenated(_alike(batches))


def map_batch(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """The batch with ``function`` applied to every tensor (or array) in it."""
    if isinstance(batch, Mapping):
        return {name: map_batch(function, part) for name, part in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(map_batch(function, part) for part in batch)
    return function(torch.as_tensor(batch))


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with all its tensors on a device."""
    return map_batch(lambda tensor: tensor.to(device), batch)


def micro_batches(ids: np.ndarray, ranks: Ranks, size: int) -> Iterator[tuple[np.ndarray, bool]]:
    """This rank's part of ``ids``, at most ``size`` at a time, and whether they count.

    Ranks with less to do repeat a sample: the passes of a sharded model need all ranks.
    """
    start, stop = ranks.share(len(ids))
    mine, longest = ids[start:stop], -(-len(ids) // ranks.size)
    for first in range(0, longest, size):
        part = mine[first : first + size]
        beat()
        yield (part, True) if len(part) else (ids[:1], False)


def all_losses(
    losses: Callable[[Batch], Tensor], samples: Samples, ranks: Ranks, size: int, device: torch.device | str
) -> Tensor:
    """Losses of all samples [sample] or [sample, position], without gradients, float64 on the CPU, alike on all ranks.

    Args:
        losses: of a batch on ``device``.
        samples: in order.
        ranks: that share the work; all of them call this.
        size: samples of one forward pass at most.
        device: of the batches.
    """
    parts = []
    with torch.no_grad():
        for part, counts in micro_batches(np.arange(len(samples)), ranks, size):
            found = losses(to_device(samples[torch.from_numpy(part)], device)).float()
            parts.append(found[: len(part) if counts else 0])
    return ranks.gather(torch.cat(parts), len(samples)).double().cpu()


def _concatenated(batches: list[Batch]) -> Batch:
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Mapping):
        return {name: _concatenated([batch[name] for batch in batches]) for name in first}
    if isinstance(first, tuple | list):
        return type(first)(_concatenated(list(parts)) for parts in zip(*batches, strict=True))
    return torch.cat([torch.as_tensor(batch) for batch in batches])


def _alike(batches: list[Batch]) -> list[Batch]:
    """Token batches of sets with and without masks: those without get some by which everything counts."""
    keys = {key for batch in batches if isinstance(batch, Mapping) for key in batch}
    if keys and not all(isinstance(batch, Mapping) and batch.keys() == keys for batch in batches):
        return [_with_masks(batch, keys) for batch in batches]
    return batches


def _with_masks(batch: Batch, keys: set[str]) -> Batch:
    tokens = batch["tokens"] if isinstance(batch, Mapping) else batch
    plain = {
        "tokens": tokens,
        "counted": torch.ones_like(tokens[:, 1:], dtype=torch.bool),
        "position_ids": torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens),
    }
    return {key: batch[key] if isinstance(batch, Mapping) and key in batch else plain[key] for key in keys}
