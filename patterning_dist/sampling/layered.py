"""A model cut around what moves, and samples that come again with what does not move of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from patterning_dist.sampling.samples import Batch

State = Any  # tensors, in tuples, lists and mappings


class Layered(Protocol):
    """A model in two parts, so that what does not move with a component is computed once for a batch that comes again.

    A state holds for every position of the component.

    Attributes:
        pays_once: whether it is worth its while for the gradient of a batch that is taken only once.
    """

    @property
    def pays_once(self) -> bool: ...

    def below(self, batch: Batch, room: int) -> State:
        """What lies below the component and beside it; no gradient is needed.

        Args:
            batch: samples.
            room: bytes that the state may take where it can be had in less, too; what is more than that is left to
                ``above``.
        """
        ...

    def above(self, state: State, batch: Batch) -> Tensor:
        """Losses of the batch, from there."""
        ...


class Prepared(NamedTuple):
    """Samples that are evaluated again and again: this rank's batches, with what does not move.

    ``parts``: (batch, what does not move of it, samples of it that count), an iterator where they are needed once;
    ``num_samples`` on all ranks.
    """

    parts: Iterable[tuple[Batch, State | None, int]]
    num_samples: int
