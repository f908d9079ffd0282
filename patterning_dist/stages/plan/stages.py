"""The lines of a plan: counts, time, processes, memory and disk of every stage, put together from what was measured."""

from __future__ import annotations

from typing import Any

from patterning_dist.config import Config, StudyConfig
from patterning_dist.response.cost import Seconds, UnitCounts
from patterning_dist.runtime.probe.chains import ChainProbe
from patterning_dist.runtime.probe.training import JobTimes, StepTimes
from patterning_dist.sampling.study import Study
from patterning_dist.stages.plan import training
from patterning_dist.stages.plan.sampling import SamplingShape, sampling_disk, sampling_seconds
from patterning_dist.stages.plan.table import StagePlan


def plan_train(config: Config, job: JobTimes, steps: StepTimes) -> StagePlan:
    """Stage train."""
    settings = config.training
    return StagePlan(
        "train",
        f"{settings.num_steps:,} steps, {settings.anneal_steps:,} of annealing",
        training.train_seconds(config, job, steps.evaluation),
        settings.num_workers,
        settings.threads_per_worker,
        on_device=True,
        process_bytes=steps.process_bytes,
        disk_bytes=training.train_disk(steps.weight_bytes),
        details=_training_details(steps, settings.num_steps + settings.anneal_steps),
    )


def plan_retrain(config: Config, job: JobTimes, steps: StepTimes) -> StagePlan:
    """Stage retrain."""
    number = training.num_retrainings(config)
    return StagePlan(
        "retrain",
        f"{number} trainings of {config.retrain.num_steps:,} steps, {steps.num_lanes} at once",
        training.retrain_seconds(config, job, steps),
        steps.num_lanes * config.retrain.num_workers,
        config.training.threads_per_worker,
        on_device=True,
        process_bytes=steps.process_bytes,
        disk_bytes=training.retrain_disk(config, steps.weight_bytes),
        details=_training_details(steps, number * config.retrain.num_steps),
    )


def _training_details(steps: StepTimes, num_steps: int) -> dict[str, Any]:
    return {
        "num_steps": num_steps,
        "weight_bytes": steps.weight_bytes,
        "gradient_bytes": steps.weight_bytes,
        "optimizer_bytes": steps.optimizer_bytes,
        "activation_bytes": steps.activation_bytes,
    }


def plan_chains(
    stage: str,
    config: Config | StudyConfig,
    counts: dict[str, UnitCounts],
    standing_for: dict[str, str],
    probe: ChainProbe,
    shape: SamplingShape,
    reduction: Seconds,
) -> StagePlan:
    """The chains of a run or a study.

    Args:
        stage: its name.
        config: of the experiment.
        counts: unit -> what its chains do.
        standing_for: unit -> the one that was timed in its place.
        probe: those times.
        shape: sizes of what is recorded.
        reduction: time of what follows the chains.
    """
    sampling = config.sampling
    num_chains = sum(unit.num_chains for unit in counts.values())
    num_draws = sum(unit.num_chains * unit.num_draws for unit in counts.values())
    num_steps = sum(unit.num_chains * unit.num_steps for unit in counts.values())
    num_pushes = sum(unit.num_chains * unit.num_pushes for unit in counts.values()) * sampling.aggregator_shards
    coordinates = {unit: probe.units[standing_for[unit]].num_coordinates for unit in counts}
    largest = max(probe.units.values(), key=lambda times: times.activation_bytes + times.state_bytes)
    return StagePlan(
        stage,
        f"{num_chains:,} chains, {num_steps:,} steps, {num_draws:,} draws, {num_pushes:,} pushes",
        sampling_seconds(counts, standing_for, probe, shape.gradients_of) + reduction,
        probe.num_workers * sampling.ranks_per_chain,
        sampling.threads_per_worker,
        on_device=True,
        process_bytes=probe.process_bytes,
        disk_bytes=sampling_disk(counts, sampling, shape, coordinates),
        details={
            "num_chains": num_chains,
            "num_steps": num_steps,
            "num_draws": num_draws,
            "num_pushes": num_pushes,
            "weight_bytes": probe.weight_bytes,
            "gradient_bytes": largest.gradient_bytes,
            "state_bytes": largest.state_bytes,
            "activation_bytes": largest.activation_bytes,
        },
    )


def plan_solve(
    config: Config, study: Study, unit: UnitCounts, num_coordinates: int, probe: ChainProbe, seconds: Seconds
) -> StagePlan:
    """Stage solve."""
    return StagePlan(
        "solve",
        f"{study.num_pool_tokens:,} weights",
        seconds,
        probe.num_workers,
        config.sampling.threads_per_worker,
        on_device=True,
        process_bytes=probe.process_bytes,
        disk_bytes=training.solve_disk(config, study, unit, num_coordinates),
    )
