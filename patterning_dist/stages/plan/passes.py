"""What passes over the pool take: first moments, and the controls' own."""

from __future__ import annotations

from collections.abc import Sequence

from patterning_dist.config.controls import (
    AblationControlConfig,
    DrawsKind,
    FirstMomentControlConfig,
    GradientControlConfig,
    InfluenceControlConfig,
    LossContrastControlConfig,
)
from patterning_dist.response.cost import Seconds, makespan
from patterning_dist.runtime.pool import SUBSET_TASKS, pool_shards
from patterning_dist.runtime.probe.chains import ChainTimes
from patterning_dist.stages.plan.sampling import Chains
from patterning_dist.stages.scores import SAMPLES_BY_CHAIN

_GRADIENT_PASSES = 4  # what a gradient takes, forwards and backwards, and below the component


def share_by_chain(chains: Chains) -> float:
    """Share of the pool that is scored chain by chain."""
    return min(1.0, SAMPLES_BY_CHAIN / len(chains.subjects.task.train))


def moment_seconds(chains: Chains, solved: Sequence[str]) -> Seconds:
    """Time of the first moments of pool and probe."""
    assert chains.config.solve is not None
    passes = _moment_passes(chains, solved[0], chains.config.solve.draws)
    times, sample = sample_seconds(chains, solved[0])
    probed = times.opening + sample * (len(chains.subjects.probe.ids) * passes)
    tasks = [probed] * (len(solved) if len(solved) > 1 else 0) + _moment_tasks(chains, solved[0], passes)
    return chains.probe.starting + makespan(tasks, chains.probe.num_workers)


def control_tasks(chains: Chains, subject: str) -> list[Seconds]:
    """Tasks of the controls' own passes over the pool."""
    settings, tasks = chains.config.solve, list[Seconds]()
    assert settings is not None
    for control in settings.controls:
        match control:
            case AblationControlConfig():  # at w*, where the component is 0, and below it
                tasks += _pool_tasks(chains, subject, 3)
            case FirstMomentControlConfig():
                tasks += _moment_tasks(chains, subject, _moment_passes(chains, subject, control.draws))
            case GradientControlConfig() | InfluenceControlConfig():
                times, sample = sample_seconds(chains, subject)
                passes = len(chains.subjects.split_loss(control.split).samples) * _GRADIENT_PASSES
                if isinstance(control, InfluenceControlConfig):  # a product takes two gradients
                    products = control.conjugate_gradient_iterations * control.hessian_sequences
                    passes += products * 2 * _GRADIENT_PASSES
                tasks += [times.opening + sample * passes]
                tasks += _pool_tasks(chains, subject, 3)  # on both sides, and below the component
            case LossContrastControlConfig():  # at both checkpoints, from the bottom
                tasks += _pool_tasks(chains, subject, 2) * 2
    return tasks


def _moment_passes(chains: Chains, subject: str, draws: DrawsKind) -> int:
    """Forward passes of a sample: every draw, the centre, and what lies below the component."""
    settings = chains.config.solve
    assert settings is not None
    replicates = 2 if draws == "antithetic" else chains.counts[subject].num_chains
    return replicates * settings.num_draws + 2


def _moment_tasks(chains: Chains, subject: str, passes: int) -> list[Seconds]:
    """Tasks of first moments: replicate by replicate on a part of the pool, and on all of it."""
    times, sample = sample_seconds(chains, subject)
    part = share_by_chain(chains) * len(chains.subjects.task.train) / SUBSET_TASKS
    return [times.opening + sample * (part * passes)] * SUBSET_TASKS + _pool_tasks(chains, subject, passes)


def _pool_tasks(chains: Chains, subject: str, passes: float) -> list[Seconds]:
    """Tasks of so many forward passes over the pool."""
    times, sample = sample_seconds(chains, subject)
    return [times.opening + sample * (len(ids) * passes) for ids in pool_shards(len(chains.subjects.task.train))]


def sample_seconds(chains: Chains, subject: str) -> tuple[ChainTimes, Seconds]:
    """Times of the subject's chains, and that of a pass over one sample: what measuring a draw takes, by the sample."""
    times, held_out = chains.probe.chains[chains.standing_for[subject]], chains.subjects.held_out
    measured = len(chains.subjects.probe.ids) + (0 if held_out is None else len(held_out.samples))
    return times, times.draw * (1 / measured)
