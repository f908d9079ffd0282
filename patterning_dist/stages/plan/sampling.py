"""What the chains of an experiment will take, from pieces of them that were timed: for runs and studies alike."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from patterning_dist.config import SamplingConfig
from patterning_dist.models.components import select_component
from patterning_dist.response.cost import NOTHING, Seconds, UnitCounts, aggregator_bytes, makespan
from patterning_dist.response.moments import CoMoments
from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.runtime.probe.chains import ChainProbe, UnitTimes

# Components that are timed; of more kinds than these, the nearest in size stands in.
_MAX_KINDS = 8
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class SamplingShape:
    """Sizes of what is recorded at a draw, and which component takes gradients.

    Attributes:
        num_observables, num_columns: numbers measured at a draw.
        num_splits: split losses, whose gradients are summed on the chains of ``gradients_of``.
        gradients_of: that component; None: there is none.
    """

    num_observables: int
    num_columns: int
    num_splits: int
    gradients_of: str | None


def count_units(sampling: SamplingConfig) -> dict[str, UnitCounts]:
    """Component -> what its chains do."""
    counts = {}
    for component in sampling.components:
        resolved = sampling.resolve(component.name)
        counts[component.name] = UnitCounts.of(
            component.name,
            num_chains=resolved.num_chains,
            num_draws=resolved.num_draws,
            burn_in=resolved.burn_in,
            steps_between_draws=resolved.steps_between_draws,
            draws_per_push=sampling.draws_per_push,
        )
    return counts


def representatives(model: nn.Module, names: list[str], gradients_of: str | None) -> dict[str, str]:
    """Component -> the one whose times stand for it: with as many coordinates, as deep in the model."""
    components = {name: select_component(model, name) for name in names}
    kinds: dict[tuple[Any, ...], str] = {}
    kind_of = {name: (c.num_coordinates, c.first_layer, name == gradients_of) for name, c in components.items()}
    for name, kind in kind_of.items():
        kinds.setdefault(kind, name)
    ordered = sorted(kinds)
    if len(ordered) > _MAX_KINDS:
        own = [kind for kind in ordered if kind[2]]
        others = [kind for kind in ordered if not kind[2]]
        kept = own + [others[i] for i in np.linspace(0, len(others) - 1, _MAX_KINDS - len(own)).round().astype(int)]
        nearest = {kind: min(kept, key=lambda other, kind=kind: abs(other[0] - kind[0])) for kind in ordered}
        return {name: kinds[kind if kind in kept else nearest[kind]] for name, kind in kind_of.items()}
    return {name: kinds[kind] for name, kind in kind_of.items()}


def sampling_seconds(
    counts: dict[str, UnitCounts], standing_for: dict[str, str], probe: ChainProbe, gradients_of: str | None
) -> Seconds:
    """Wall time of all chains: workers take them in the order of the run, whose longest component goes first."""
    order = sorted(counts, key=lambda name: name != gradients_of)
    return probe.starting + makespan(
        [
            _chain_seconds(counts[name], probe.units[standing_for[name]])
            for name in order
            for _ in range(counts[name].num_chains)
        ],
        probe.num_workers,
    )


def _chain_seconds(unit: UnitCounts, times: UnitTimes) -> Seconds:
    return times.opening + times.step * unit.num_steps + times.draw * unit.num_draws


def statistics_bytes(counts: dict[str, UnitCounts], sampling: SamplingConfig, shape: SamplingShape) -> int:
    """Memory of the aggregator when all chains are under way or through."""
    return sum(
        aggregator_bytes(unit, sampling.num_batches, shape.num_observables, shape.num_columns)
        for unit in counts.values()
    )


def sampling_disk(
    counts: dict[str, UnitCounts], sampling: SamplingConfig, shape: SamplingShape, coordinates: dict[str, int]
) -> int:
    """Bytes under sampling/ and of the tables of chi, a row a probe column."""
    total = statistics_bytes(counts, sampling, shape)
    for name, unit in counts.items():
        total += unit.num_chains * shape.num_columns * 2 * _FLOAT  # losses at the centre
        if name == shape.gradients_of:
            total += unit.num_chains * (1 + shape.num_splits) * coordinates[name] * 2 * _FLOAT
        total += shape.num_columns * _FLOAT * (3 + 2 * shape.num_observables)
    return total


def reduction_seconds(counts: dict[str, UnitCounts], sampling: SamplingConfig, shape: SamplingShape) -> Seconds:
    """Time of chi and its errors in the driver, of every component: done on made-up draws of the real size."""
    if not counts:
        return NOTHING
    largest = max(counts.values(), key=lambda unit: unit.num_chains)
    rng = np.random.default_rng(0)
    chains = []
    for chain in range(max(largest.num_chains, 2)):
        moments = CoMoments.empty(
            chain, sampling.num_batches * 2, shape.num_observables, shape.num_columns, sampling.num_batches
        )
        draws = (sampling.num_batches * 2, 1)
        moments.update(
            rng.normal(size=(draws[0], shape.num_observables)), rng.normal(size=(draws[0], shape.num_columns))
        )
        chains.append(moments)
    started = time.perf_counter()
    susceptibility(chains, min_chains=2)
    return Seconds.about((time.perf_counter() - started) * len(counts), 0.5)
