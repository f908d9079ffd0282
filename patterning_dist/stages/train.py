"""Stages ``train`` and ``retrain``: the baseline with its annealed checkpoint, and the arms on weighted data."""

from __future__ import annotations

import shutil
from pathlib import Path

from patterning_dist.config import BASELINE, ArmConfig, Config
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.runtime.training.checkpoints import delete_checkpoints
from patterning_dist.runtime.training.jobs import run_jobs
from patterning_dist.storage.files import atomic_path
from patterning_dist.storage.run import RunDirectory
from patterning_dist.tasks.open import open_task
from patterning_dist.training.job import TrainingJob

JOB_FILES = ("initial.safetensors", "model.safetensors", "metrics.parquet", "evaluation.json")


def train(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Train the baseline and anneal it to the checkpoint w*; returns the files written."""
    run.place.fetch("data")
    return _run(config, run, progress, "training the baseline", [baseline_job(config, run.path)], 1)


def retrain(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Train every arm with every seed, side by side where CPUs or GPUs allow; returns the files written.

    Raises:
        PatterningError: a table of weights is not there, or what ``run_jobs`` raises.
    """
    run.place.fetch("data", "weights", "retrain", *config.checkpoints)
    assert config.retrain is not None
    jobs = arm_jobs(config, run)
    return _run(config, run, progress, "retraining", jobs, config.retrain.concurrent_arms)


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


def arm_jobs(config: Config, run: RunDirectory) -> list[TrainingJob]:
    """All arms of the first seed, then those of the next."""
    assert config.retrain is not None
    arms = config.retrain.arm_list
    task = open_task(config, run.path, "cpu")
    tables = {arm.name: arm_weights(arm, run) for arm in arms}
    inputs = {arm.start: task.fingerprint(_start(arm)) for arm in arms}
    seeds = dict.fromkeys(seed for arm in arms for seed in arm.seeds)
    return [
        _arm_job(config, run.path, arm, seed, tables[arm.name], inputs[arm.start])
        for seed in seeds
        for arm in arms
        if seed in arm.seeds
    ]


def _arm_job(
    config: Config, directory: Path, arm: ArmConfig, seed: int, weights: Path | None, inputs: object
) -> TrainingJob:
    settings = config.retrain
    assert settings is not None
    splits = [(o.name, o.split) for o in config.sampling.observables if o.kind == "split_loss"]
    return TrainingJob(
        name=f"{arm.name} seed {seed}",
        folder=directory / "retrain" / arm.name / f"seed-{seed}",
        inputs=inputs,
        seed=seed,
        num_steps=settings.num_steps,
        evaluate_every=settings.evaluate_every,
        start=_start(arm),
        weights=weights,
        strength=arm.strength,
        weighting=arm.weighting,
        weighted_share=arm.weighted_share,
        splits=tuple(splits),
        deepspeed=settings.deepspeed,
        num_workers=settings.num_workers,
    )


def _start(arm: ArmConfig) -> str | None:
    return None if arm.start == "initialisation" else arm.start


def arm_weights(arm: ArmConfig, run: RunDirectory) -> Path | None:
    """The arm's table; one of the user's own is copied into the run, which every node sees and which replays itself."""
    if arm.weights is None or isinstance(arm.weights, str):
        return None if arm.weights is None else run.path / "weights" / f"{arm.weights}.parquet"
    copy = run.path / "retrain" / arm.name / "weights.parquet"
    if arm.weights.exists():
        with atomic_path(copy) as temporary:
            shutil.copyfile(arm.weights, temporary)
        run.publish(copy)
    elif not copy.exists():
        raise PatterningError(f"retrain.arms: {arm.weights}, the weights of {arm.name}, is not there; correct the path")
    return copy


def _run(
    config: Config, run: RunDirectory, progress: Progress, label: str, jobs: list[TrainingJob], concurrent: int | None
) -> list[Path]:
    run.place.fetch(*(job.folder.relative_to(run.path).as_posix() for job in jobs))
    unfinished = [job for job in jobs if not job.is_finished(config)]
    for job in jobs:
        if job not in unfinished:
            run.event("train", "job_kept", job=job.name)
            delete_checkpoints(run.storage, run.path, job)  # of a worker that died between finishing and doing so
    if unfinished:
        run_jobs(config, run, unfinished, label, progress, concurrent)
    return [job.folder / name for job in jobs for name in _files(job)]


def _files(job: TrainingJob) -> list[str]:
    """Of a job that is done, and what makes it a checkpoint for others (config.json)."""
    described = [file.name for file in sorted(job.folder.glob("*.json")) if file.name not in JOB_FILES]
    return [*JOB_FILES, *described]
