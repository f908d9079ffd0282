"""Stages ``train`` and ``retrain``: the baseline with its annealed checkpoint, and the arms on weighted data."""

from __future__ import annotations

from pathlib import Path

from patterning_dist.config import Config
from patterning_dist.progress import Progress
from patterning_dist.runtime.training.checkpoints import delete_checkpoints
from patterning_dist.runtime.training.jobs import run_jobs
from patterning_dist.storage.run import RunDirectory
from patterning_dist.training.job import TrainingJob

JOB_FILES = ("initial.safetensors", "model.safetensors", "metrics.parquet", "evaluation.json")


def train(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Train the baseline and anneal it to the checkpoint w*; returns the files written."""
    training = config.training
    job = TrainingJob(
        name="baseline",
        pool=run.path / "data" / "train.parquet",
        folder=run.path / "baseline",
        seed=config.seed,
        num_steps=training.num_steps,
        anneal_steps=training.anneal_steps,
        evaluate_every=training.evaluate_every,
        weights=None,
        start=None,
        deepspeed=training.deepspeed,
        num_workers=training.num_workers,
    )
    return _run(config, run, progress, "training the baseline", [job], 1)


def retrain(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Train every arm with every seed, side by side where CPUs or GPUs allow; returns the files written."""
    settings = config.retrain
    jobs = [
        TrainingJob(
            name=f"{arm} seed {seed}",
            pool=run.path / "data" / "train.parquet",
            folder=run.path / "retrain" / arm / f"seed-{seed}",
            seed=seed,
            num_steps=settings.num_steps,
            anneal_steps=0,
            evaluate_every=settings.evaluate_every,
            weights=None if arm == "base" else run.path / "weights" / f"{arm}.parquet",
            start=run.path / "baseline" / "model.safetensors" if settings.start == "baseline" else None,
            deepspeed=settings.deepspeed,
            num_workers=settings.num_workers,
        )
        for seed in settings.seeds
        for arm in settings.arms
    ]
    return _run(config, run, progress, "retraining", jobs, settings.concurrent_arms)


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
    return [job.folder / name for job in jobs for name in JOB_FILES]
