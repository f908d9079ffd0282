"""The ranks that share one chain: sums and concatenations over torch.distributed, or nothing at all with one rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those of its chain group.

    Attributes:
        rank: its number, from 0.
        size: how many there are; above 1 the default process group must have been set up.
    """

    rank: int = 0
    size: int = 1

    def share(self, num: int) -> tuple[int, int]:
        """This rank's part [start, stop) of ``num`` things in order; parts differ by one at most."""
        return num * self.rank // self.size, num * (self.rank + 1) // self.size

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, the same bits on all of them."""
        if self.size > 1:
            dist.all_reduce(values := values.clone())
        return values

    def gather(self, part: Tensor, num: int) -> Tensor:
        """The ranks' parts, cut as ``share(num)`` has it, in one tensor [num, ...]."""
        if self.size == 1:
            return part
        longest = -(-num // self.size)
        padded = part.new_zeros((longest, *part.shape[1:]))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        lengths = [Ranks(rank, self.size).share(num) for rank in range(self.size)]
        return torch.cat([p[: stop - start] for p, (start, stop) in zip(parts, lengths, strict=True)])
