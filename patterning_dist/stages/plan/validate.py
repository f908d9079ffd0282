"""What stage validate takes: its bank of short retrainings, scores of every method, and losses of the queries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from patterning_dist.config import Config
from patterning_dist.config.validation import RANDOM
from patterning_dist.response.cost import NOTHING, Seconds, makespan
from patterning_dist.runtime.attribution import MODELS_A_TASK
from patterning_dist.runtime.pool import pool_shards
from patterning_dist.stages.bank import FOLDER, STACK
from patterning_dist.stages.plan.passes import sample_seconds
from patterning_dist.stages.plan.sampling import Chains
from patterning_dist.stages.plan.table import StagePlan
from patterning_dist.stages.plan.training import Trainings, Trial
from patterning_dist.tasks.held_out import held_out_ids
from patterning_dist.tasks.task import Task
from patterning_dist.training.job import TrainingJob

_PRODUCT_GRADIENTS = 3  # that a Hessian product takes as long as, one backward pass through another


def num_queries(config: Config, task: Task) -> int:
    """Held-out samples that scores are for."""
    assert config.validation is not None
    return sum(map(len, held_out_ids(task, config.seed, config.validation.num_queries, "realised").values()))


def num_trainings(config: Config, task: Task) -> tuple[int, int]:
    """Retrainings on subsets and on everything, and those without what scores single out; all seeds."""
    settings = config.validation
    assert settings is not None
    if settings.bank is not None:
        return 0, 0
    methods = len({*settings.methods, *settings.scores, RANDOM})
    kinds = (settings.removed_share is not None) + (settings.removed_token_share is not None)
    seeds = len(settings.seeds)
    return (1 + settings.num_subsets) * seeds, kinds * methods * num_queries(config, task) * seeds


def validate_trial(config: Config, directory: Path, task: Task) -> Trial | None:
    """A retraining of the bank, or a stack of them; None: the bank is there."""
    settings = config.validation
    assert settings is not None
    number = sum(num_trainings(config, task))
    if not number:
        return None
    assert settings.num_steps is not None  # checked with the file
    jobs = [
        TrainingJob(
            name="probe",
            folder=directory / FOLDER / f"probe-{copy}",
            inputs=None,
            seed=settings.seeds[0],
            num_steps=settings.num_steps,
            evaluate_every=settings.num_steps,
            start=settings.start or config.checkpoints[0],
            stack="probe" if settings.engine == "stacked" else None,
        )
        for copy in range(networks(config, number))
    ]
    return Trial(jobs, -(-number // len(jobs)))


def networks(config: Config, number: int) -> int:
    """That one training of the bank is of, of so many in all."""
    assert config.validation is not None
    return min(STACK, number) if config.validation.engine == "stacked" else 1


def validation_subject(chains: Chains) -> str:
    """The subject whose chains cost what those of the scores do."""
    settings, by_name = chains.config.validation, chains.subjects.by_name
    assert settings is not None
    component = settings.component
    return next(
        (name for name, s in by_name.items() if s.component == component and not s.half_step), next(iter(by_name))
    )


def plan_validate(chains: Chains, trainings: Trainings | None) -> StagePlan:
    """Stage validate.

    Args:
        chains: of the experiment, one of whose components the scores are of.
        trainings: what one of the bank takes, or a stack; None: the bank is there.
    """
    settings, probe, config = chains.config.validation, chains.probe, chains.config
    assert settings is not None
    task, subject = chains.subjects.task, validation_subject(chains)
    on_subsets, without = num_trainings(config, task)
    queries, models = num_queries(config, task), on_subsets + without
    if settings.bank is not None:
        models = settings.num_subsets + 1
    found = [plan.seconds for plan in [_sampled(chains, subject)] if plan is not None]
    found += [_bank_seconds(config, trainings, number) for number in (on_subsets, without) if trainings and number]
    times, sample = sample_seconds(chains, subject)
    losses = [
        times.opening + (times.opening + sample * queries) * min(MODELS_A_TASK, models - start)
        for start in range(0, models, MODELS_A_TASK)
    ]
    passes = [_score_tasks(chains, subject, queries), losses]
    found += [probe.starting + makespan(tasks, probe.num_workers) for tasks in passes if tasks]
    scored = len(task.train) * (task.num_positions or 1 if settings.removed_token_share is not None else 1)
    tables = len({*settings.methods, *settings.scores, RANDOM}) * queries * scored * 4
    weights = 0 if trainings is None else 2 * models * trainings.steps.weight_bytes // networks(config, models)
    plan = StagePlan(
        "validate",
        f"{on_subsets:,} trainings on subsets and all, {without:,} without what scores single out, of "
        f"{settings.num_steps or 0:,} steps; scores of {len(task.train):,} samples for {queries:,} queries",
        sum(found, NOTHING),
        probe.num_workers * config.sampling.ranks_per_chain,
        config.sampling.threads_per_worker,
        on_device=True,
        process_bytes=probe.process_bytes,
        disk_bytes=weights + tables,
        details={"num_trainings": on_subsets + without},
    )
    if trainings is None:
        return plan
    largest = max(probe.process_bytes, trainings.steps.process_bytes)
    return replace(plan, process_bytes=largest)


def _bank_seconds(config: Config, trainings: Trainings, number: int) -> Seconds:
    """Of so many trainings, with as many queues as fit; the weights of the last stack may be fewer."""
    assert config.validation is not None and config.validation.num_steps is not None
    job, steps = trainings.job, trainings.steps
    one = job.opening + steps.step * config.validation.num_steps + steps.evaluation + job.closing
    groups = -(-number // networks(config, number))
    return job.starting + makespan([one] * groups, steps.num_queues) + job.stopping


def _sampled(chains: Chains, subject: str) -> StagePlan | None:
    """The chains that susceptibilities are from."""
    assert chains.config.validation is not None
    return chains.plan_again("validate", subject, 1) if "susceptibility" in chains.config.validation.methods else None


def _score_tasks(chains: Chains, subject: str, queries: int) -> list[Seconds]:
    """Passes over the pool on workers, method by method; overlap of tokens takes none."""
    config, settings = chains.config, chains.config.validation
    assert settings is not None
    times, sample = sample_seconds(chains, subject)
    direction, pool = config.response.direction, len(chains.subjects.task.train)
    iterations, samples = (
        (direction.conjugate_gradient_iterations, direction.hessian_sequences) if direction else (20, 64)
    )
    along = times.opening + sample * (2 * pool)
    product = times.step * (_PRODUCT_GRADIENTS * samples / config.sampling.batch_size)
    tasks: list[Seconds] = []
    if "gradient" in settings.methods:
        tasks += [along] * queries
    if "influence" in settings.methods:  # half of the products may do
        tasks += [along + Seconds(product.value, product.low / 2, product.high) * iterations] * queries
    if "susceptibility" in settings.methods:
        draws = settings.num_draws * chains.counts[subject].num_chains
        tasks += [times.opening + sample * ((len(ids) + queries) * draws) for ids in pool_shards(pool)]
    return tasks
