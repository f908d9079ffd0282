"""Stages ``train`` and ``retrain``: the baseline with its annealed checkpoint, and the arms on weighted data."""

from __future__ import annotations

import shutil
from pathlib import Path

from patterning_dist.config import BASELINE, Config, TextConfig
from patterning_dist.config.window import arm_steps
from patterning_dist.errors import PatterningError
from patterning_dist.measure.preflight import refuse_domains
from patterning_dist.progress import Progress
from patterning_dist.runtime.training.checkpoints import delete_checkpoints
from patterning_dist.runtime.training.jobs import run_jobs
from patterning_dist.stages.online import join_rounds, weigh_again
from patterning_dist.stages.rounds import Round, rounds_of
from patterning_dist.storage.files import atomic_path, read_object
from patterning_dist.storage.run import RunDirectory, in_words
from patterning_dist.tasks.open import open_task
from patterning_dist.training.job import TrainingJob, grouped, job_files


def train(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Train the baseline and anneal it to the checkpoint w*; returns the files written.

    Raises:
        PatterningError: a split is of a domain that the data do not have, or what ``run_jobs`` raises.
    """
    run.location.fetch("data")
    if isinstance(config.data, TextConfig):  # whose rows may have said their domains
        read = read_object(run.path / "data" / "corpus.json").get("validation", {})
        refuse_domains(config, read.get("sequences_per_domain"))
    return run_unfinished(config, run, progress, "training the baseline", [baseline_job(config, run.path)], 1)


def retrain(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Train every arm with every seed, round by round, side by side where CPUs or GPUs allow; returns files written.

    Raises:
        PatterningError: a table of weights is not there, or what ``run_jobs`` and ``weigh_again`` raise.
    """
    run.location.fetch("data", "weights", "retrain", *config.checkpoints)
    assert config.retrain is not None
    most, files = max(arm.rounds for arm in config.retrain.arm_list), []
    for number in range(1, most + 1):
        if number > 1:
            if jobs := annealing_jobs(config, run, number):
                label = f"annealing round {number - 1} on plain weights"
                files += run_unfinished(config, run, progress, label, jobs, config.retrain.concurrent_arms)
            files += weigh_again(config, run, progress, number)
        label = "retraining" if most == 1 else f"retraining, round {number} of {most}"
        jobs = arm_jobs(config, run, number)
        files += run_unfinished(config, run, progress, label, jobs, config.retrain.concurrent_arms)
    return [*files, *join_rounds(config, run)]


def baseline_job(config: Config, directory: Path) -> TrainingJob:
    """The training that makes the checkpoint to sample around."""
    training = config.training
    assert training is not None
    return TrainingJob(
        name=BASELINE,
        folder=directory / BASELINE,
        inputs=open_task(config, directory, "cpu").fingerprint(),
        seed=config.seed,
        num_steps=training.num_steps,
        anneal_steps=training.anneal_steps,
        evaluate_every=training.evaluate_every,
        deepspeed=training.deepspeed,
        num_workers=training.num_workers,
    )


def arm_jobs(config: Config, run: RunDirectory, number: int = 1) -> list[TrainingJob]:
    """Round ``number`` of every arm that has so many: all arms of the first seed, then those of the next."""
    rounds, task = rounds_of(config, number), open_task(config, run.path, "cpu")
    tables = {part.weights: round_weights(part, run) for part in rounds}
    inputs = {start: task.fingerprint(start) for start in {part.start for part in rounds}}
    return [_arm_job(config, run.path, part, tables[part.weights], inputs[part.start]) for part in rounds]


def annealing_jobs(config: Config, run: RunDirectory, number: int) -> list[TrainingJob]:
    """What first moments of round ``number`` are read off: where the rounds before end, annealed on plain weights.

    A network under weights overuses what they favour, and its components tell of that.
    """
    assert config.solve is not None and config.retrain is not None and config.training is not None
    if config.solve.scores != "first_moment":
        return []
    rounds, task = [part.before for part in rounds_of(config, number)], open_task(config, run.path, "cpu")
    steps = config.training.anneal_steps
    return [
        TrainingJob(
            name=f"{part.name}, annealed",
            folder=run.path / part.annealed,
            inputs=task.fingerprint(part.folder),
            seed=part.data_seed,
            num_steps=0,
            anneal_steps=steps,
            rate_factor=config.retrain.rate_factor,
            evaluate_every=steps,
            start=part.folder,
            deepspeed=config.retrain.deepspeed,
            num_workers=config.retrain.num_workers,
            stack=part.arm.name if config.retrain.engine == "stacked" else None,
        )
        for part in rounds
    ]


def _arm_job(config: Config, directory: Path, part: Round, weights: Path | None, inputs: object) -> TrainingJob:
    settings, arm = config.retrain, part.arm
    assert settings is not None
    splits = [(o.name, o.split) for o in config.sampling.observables if o.kind == "split_loss"]
    return TrainingJob(
        name=part.name,
        folder=directory / part.folder,
        inputs=inputs,
        seed=part.data_seed,
        num_steps=part.num_steps(arm_steps(config, arm)),
        rate_factor=settings.rate_factor if arm.window is None else 1.0,
        evaluate_every=settings.evaluate_every,
        start=part.start,
        weights=weights,
        strength=arm.strength,
        weighting=arm.weighting,
        weighted_share=arm.weighted_share,
        splits=tuple(splits),
        deepspeed=settings.deepspeed,
        num_workers=settings.num_workers,
        window=arm.window,
        stack=arm.name if settings.engine == "stacked" else None,
    )


def round_weights(part: Round, run: RunDirectory) -> Path | None:
    """The arm's table; one of the user's own is copied into the run, which every node sees and which replays itself."""
    if part.weights is None:
        return None
    arm, table = part.arm, run.path / part.weights
    if isinstance(arm.weights, Path) and arm.weights.exists():
        with atomic_path(table) as temporary:
            shutil.copyfile(arm.weights, temporary)
        run.publish(table)
    elif isinstance(arm.weights, Path) and not table.exists():
        raise PatterningError(f"retrain.arms: {arm.weights}, the weights of {arm.name}, is not there; correct the path")
    return table


def run_unfinished(
    config: Config, run: RunDirectory, progress: Progress, label: str, jobs: list[TrainingJob], concurrent: int | None
) -> list[Path]:
    """Train the jobs whose results are not there yet, see ``runtime.training.jobs.run_jobs``; the files of all."""
    run.location.fetch(*(job.folder.relative_to(run.path).as_posix() for job in jobs))
    unfinished = [job for group in grouped(jobs) if not group.is_finished(config) for job in group.jobs]
    for job in jobs:
        if job in unfinished:
            if job.reports_its_end(config):
                progress.say(f"{job.name}: {in_words(job.changed_files())}; it is trained again")
        else:
            run.event("train", "job_kept", job=job.name)
            delete_checkpoints(run.storage, run.path, job)  # of a worker that died between finishing and doing so
    if unfinished:
        run_jobs(config, run, unfinished, label, progress, concurrent)
    return [file for job in jobs for file in job_files(job.folder)]
