"""Views of samples that are addressed by number: a part of them, or several sets end to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patterning_dist.sampling.module_target import Samples


class Part:
    """The samples ``ids`` of a set, renumbered from 0."""

    def __init__(self, samples: Samples, ids: np.ndarray) -> None:
        self.samples, self.ids = samples, torch.from_numpy(np.asarray(ids, np.int64))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, ids: Tensor) -> Any:
        return self.samples[self.ids[ids]]


class Joined:
    """Several sets end to end; batches are asked for in ascending order of their numbers."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, ids: Tensor) -> Any:
        batches = []
        for part, start, stop in zip(self.parts, self.starts, self.starts[1:], strict=False):
            mine = ids[(ids >= start) & (ids < stop)] - start
            if len(mine):
                batches.append(part[mine])
        return _concatenated(batches)


def _concatenated(batches: list[Any]) -> Any:
    if len(batches) == 1:
        return batches[0]
    if isinstance(batches[0], tuple | list):
        return type(batches[0])(_concatenated(list(parts)) for parts in zip(*batches, strict=True))
    return torch.cat([torch.as_tensor(batch) for batch in batches])
