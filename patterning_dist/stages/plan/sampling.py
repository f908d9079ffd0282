"""What the chains of an experiment take, from pieces of them that were timed: stages sample and check."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from patterning_dist.config import Config
from patterning_dist.measure.subjects import Subjects
from patterning_dist.models.components import model_components, select_component
from patterning_dist.response.cost import ChainCounts, Seconds, aggregator_bytes, makespan
from patterning_dist.response.moments import CoMoments
from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.runtime.probe.chains import ChainProbe, ChainTimes
from patterning_dist.sampling.controlled import CONTROL_COST
from patterning_dist.stages.plan.table import StagePlan

# Components that are timed; of more kinds than these, the nearest in size stands in.
_MAX_KINDS = 8
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Chains:
    """The sets of chains of an experiment.

    Attributes:
        config: of the experiment.
        subjects: opened in this process.
        counts: subject -> what its chains do.
        standing_for: subject -> the one whose times stand for it.
        probe: those times.
    """

    config: Config
    subjects: Subjects
    counts: dict[str, ChainCounts]
    standing_for: dict[str, str]
    probe: ChainProbe

    def plan_sample(self) -> StagePlan:
        """Stage sample."""
        return self._plan("sample", self.counts, self.subjects.gradients_of)

    def plan_check(self, subject: str) -> StagePlan:
        """Stage check: the chains of a subject again, for strength 0 and for every other."""
        assert self.config.check is not None
        return self.plan_again("check", subject, 1 + len(self.config.check.strengths))

    def plan_again(self, stage: str, subject: str, times: int) -> StagePlan:
        """The chains of a subject so many times more, side by side: for stage check, or between rounds of retrain."""
        names = [f"{subject} {number}" for number in range(times)]
        again = Chains(
            self.config,
            self.subjects,
            dict.fromkeys(names, self.counts[subject]),
            dict.fromkeys(names, self.standing_for[subject]),
            self.probe,
        )
        return again._plan(stage, again.counts, frozenset(names) if stage == "retrain" else frozenset())

    def statistics_bytes(self) -> int:
        """Memory of the aggregator when all chains are under way or through."""
        sizes = (self.config.sampling.num_batches, len(self.subjects.observable_names), self.num_columns)
        return sum(aggregator_bytes(subject, *sizes) for subject in self.counts.values())

    @property
    def num_columns(self) -> int:
        """Losses recorded at a draw: every probe entry, then the mean of every sample that has several."""
        num_samples, counted = len(self.subjects.probe.ids), self.subjects.counted
        if (num_positions := self.subjects.task.num_positions) is None:
            return num_samples
        return num_samples + (num_samples * num_positions if counted is None else int(counted.sum()))

    def reduction_seconds(self) -> Seconds:
        """Time of chi and its errors of one subject, done on made-up draws of the real size."""
        num_batches, num_observables = self.config.sampling.num_batches, len(self.subjects.observable_names)
        rng, chains, num_draws = np.random.default_rng(0), [], 2 * num_batches
        for chain in range(max(2, *(subject.num_chains for subject in self.counts.values()))):
            moments = CoMoments.empty(chain, num_draws, num_observables, self.num_columns, num_batches)
            moments.update(
                rng.normal(size=(num_draws, num_observables)), rng.normal(size=(num_draws, self.num_columns))
            )
            chains.append(moments)
        started = time.perf_counter()
        susceptibility(chains, min_chains=2)
        return Seconds.about(time.perf_counter() - started, 0.5)

    def _plan(self, stage: str, counts: dict[str, ChainCounts], gradients_of: frozenset[str]) -> StagePlan:
        sampling, probe = self.config.sampling, self.probe
        totals = {
            "num_chains": sum(subject.num_chains for subject in counts.values()),
            "num_steps": sum(subject.num_chains * subject.num_steps for subject in counts.values()),
            "num_draws": sum(subject.num_chains * subject.num_draws for subject in counts.values()),
            "num_pushes": sum(subject.num_chains * subject.num_pushes for subject in counts.values())
            * sampling.aggregator_shards,
        }
        largest = max(probe.chains.values(), key=lambda times: times.activation_bytes + times.state_bytes)
        sizes = ("weight_bytes", "gradient_bytes", "state_bytes", "activation_bytes")
        return StagePlan(
            stage,
            ", ".join(f"{number:,} {name.removeprefix('num_')}" for name, number in totals.items()),
            self._seconds(counts, gradients_of, stage) + self.reduction_seconds() * len(counts),
            probe.num_workers * sampling.ranks_per_chain,
            sampling.threads_per_worker,
            on_device=True,
            process_bytes=probe.process_bytes,
            disk_bytes=sum(self._disk(name, subject, name in gradients_of) for name, subject in counts.items()),
            details=totals | {size: getattr(largest, size) for size in sizes},
        )

    def _seconds(self, counts: dict[str, ChainCounts], gradients_of: frozenset[str], stage: str) -> Seconds:
        """Wall time of all chains, which workers take in the order of the subjects."""
        chains = []
        for name, subject in counts.items():
            times = self.probe.chains[self.standing_for[name]]
            draw = times.draw + times.gradients if name in gradients_of else times.draw
            chain = times.opening + times.step * subject.num_steps + draw * subject.num_draws
            if stage == "sample" and self.config.sampling.controlled:  # weighted chains have no controls
                chain += self._controls(times, subject)
            chains += [chain] * subject.num_chains
        return self.probe.starting + makespan(chains, self.probe.num_workers)

    def _controls(self, times: ChainTimes, subject: ChainCounts) -> Seconds:
        """Of one chain's controls: conjugate gradients, gradients at draws, and derivatives of the probe's losses."""
        sampling, (products, passes) = self.config.sampling, CONTROL_COST
        rows = len(sampling.controlled)
        stein = any(c.control == "langevin_stein" for c in sampling.controlled)
        steps = rows * products / sampling.batch_size + 2 * stein * subject.num_steps
        return times.step * steps + times.draw * (rows * passes * subject.num_draws)

    def _disk(self, name: str, subject: ChainCounts, takes_gradients: bool) -> int:
        """Bytes under sampling/ and of the tables of chi, a row a probe column."""
        num_observables, num_columns = len(self.subjects.observable_names), self.num_columns
        total = aggregator_bytes(subject, self.config.sampling.num_batches, num_observables, num_columns)
        total += subject.num_chains * num_columns * 2 * _FLOAT  # losses at the centre
        if controlled := len(self.config.sampling.controlled):
            total += aggregator_bytes(subject, self.config.sampling.num_batches, controlled, num_columns)
        if takes_gradients and self.subjects.held_out is not None:
            vectors = 1 + len(self.subjects.held_out.names)
            total += (
                subject.num_chains * vectors * self.probe.chains[self.standing_for[name]].num_coordinates * 2 * _FLOAT
            )
        return total + num_columns * _FLOAT * (3 + 2 * num_observables)


def count_chains(subjects: Subjects) -> dict[str, ChainCounts]:
    """Subject -> what its chains do."""
    return {name: subject_counts(subjects, name) for name in subjects.by_name}


def subject_counts(subjects: Subjects, name: str, num_draws: int | None = None) -> ChainCounts:
    """What the chains of a subject do, with another number of draws where one is given."""
    subject = subjects.by_name[name]
    resolved = subjects.sampling.resolve(subject.component, half_step=subject.half_step)
    return ChainCounts.of(
        name,
        num_chains=resolved.num_chains,
        num_draws=num_draws or resolved.num_draws,
        burn_in=resolved.burn_in,
        steps_between_draws=resolved.steps_between_draws,
        draws_per_push=subjects.sampling.draws_per_push,
    )


def representatives(model: nn.Module, components: dict[str, str], gradients_of: frozenset[str]) -> dict[str, str]:
    """Subject -> the one whose times stand for it: with as many coordinates, as deep in the model.

    Args:
        model: of any checkpoint: one costs what another one does.
        components: subject -> component.
        gradients_of: subjects that take gradients at every draw.
    """
    kind_of: dict[str, tuple[Any, ...]] = {}
    known = model_components(model)  # of which there are thousands: found once
    for name, component in components.items():
        found = known.get(component) or select_component(model, component)
        kind_of[name] = (found.num_coordinates, found.first_layer, name in gradients_of)
    kinds: dict[tuple[Any, ...], str] = {}
    for name, kind in kind_of.items():
        kinds.setdefault(kind, name)
    ordered = sorted(kinds)
    if len(ordered) > _MAX_KINDS:
        own = [kind for kind in ordered if kind[2]]
        others = [kind for kind in ordered if not kind[2]]
        kept = own + [others[i] for i in np.linspace(0, len(others) - 1, _MAX_KINDS - len(own)).round().astype(int)]

        def nearest(kind: tuple[Any, ...]) -> tuple[Any, ...]:
            return min(kept, key=lambda other: abs(other[0] - kind[0]))

        return {name: kinds[kind if kind in kept else nearest(kind)] for name, kind in kind_of.items()}
    return {name: kinds[kind] for name, kind in kind_of.items()}
