"""Samples shared out over ranks in micro-batches, and the losses of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samples import Batch, Samples, to_device


def micro_batches(ids: np.ndarray, ranks: Ranks, size: int) -> Iterator[tuple[np.ndarray, bool]]:
    """This rank's part of ``ids``, at most ``size`` at a time, and whether they count.

    Ranks with less to do repeat a sample: the passes of a sharded model need all ranks.
    """
    start, stop = ranks.share(len(ids))
    mine, longest = ids[start:stop], -(-len(ids) // ranks.size)
    for first in range(0, longest, size):
        part = mine[first : first + size]
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
