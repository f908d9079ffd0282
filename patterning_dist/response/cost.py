"""What chains cost, from what one step, one draw and one push cost: counts, bytes and seconds. Plain arithmetic."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_DOUBLE = 8  # bytes


@dataclass(frozen=True)
class Seconds:
    """A time with the interval that it is expected in."""

    value: float
    low: float
    high: float

    @classmethod
    def measured(cls, samples: Sequence[float]) -> Seconds:
        """Mean, smallest and largest of repeated measurements; a negative difference of times counts as 0."""
        kept = [max(sample, 0.0) for sample in samples]
        return cls(sum(kept) / len(kept), min(kept), max(kept))

    @classmethod
    def about(cls, value: float, share: float) -> Seconds:
        """A value that is known to within a share of itself."""
        return cls(value, value * (1 - share), value * (1 + share))

    def __add__(self, other: Seconds) -> Seconds:
        # Interval ends are added, not squares: what makes one piece slow, a busy machine, makes all of them slow.
        return Seconds(self.value + other.value, self.low + other.low, self.high + other.high)

    def __mul__(self, count: float) -> Seconds:
        return Seconds(self.value * count, self.low * count, self.high * count)


NOTHING = Seconds(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class ChainCounts:
    """How much one set of chains on one component does.

    Attributes:
        name: of the subject.
        num_chains, num_draws: chains, and draws of each.
        num_steps: sampler steps of one chain.
        num_pushes: messages of one chain to the aggregator.
    """

    name: str
    num_chains: int
    num_draws: int
    num_steps: int
    num_pushes: int

    @classmethod
    def of(
        cls, name: str, *, num_chains: int, num_draws: int, burn_in: int, steps_between_draws: int, draws_per_push: int
    ) -> ChainCounts:
        """From the settings of a component; the first draw comes right after the burn-in."""
        steps = burn_in + (num_draws - 1) * steps_between_draws
        return cls(name, num_chains, num_draws, steps, math.ceil(num_draws / draws_per_push))


def aggregator_bytes(subject: ChainCounts, num_batches: int, num_observables: int, num_columns: int) -> int:
    """Memory of a subject's statistics in the aggregator, all chains together.

    chains * batches * ( observables * columns + 2 columns + 2 observables + 1 ) float64, and the traces.

    Args:
        subject: its chains and draws.
        num_batches: batches of consecutive draws that moments are kept of.
        num_observables: numbers measured at a draw.
        num_columns: losses recorded at a draw.
    """
    moments = num_batches * (num_observables * num_columns + 2 * num_columns + 2 * num_observables + 1)
    return subject.num_chains * _DOUBLE * (moments + subject.num_draws * (1 + num_observables))


def makespan(durations: Iterable[Seconds], num_workers: int) -> Seconds:
    """Time until all tasks are through, each begun in turn by the first worker that is free."""

    def through(values: list[float]) -> float:
        busy_until = [0.0] * num_workers
        for value in values:
            heapq.heapreplace(busy_until, busy_until[0] + value)
        return max(busy_until)

    tasks = list(durations)
    return Seconds(*(through([getattr(task, end) for task in tasks]) for end in ("value", "low", "high")))
