"""Stages ``train`` and ``retrain``: the baseline with its annealed checkpoint, and the arms on weighted data."""

from __future__ import annotations

from pathlib import Path

import ray

from patterning_dist.config import Config
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.rundir import RunDirectory
from patterning_dist.runtime.environment import ray_session, resolve_device
from patterning_dist.runtime.retraining import run_lane
from patterning_dist.runtime.workers import ProgressBoard
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
    return _run_jobs(config, run, progress, "training the baseline", [job], 1, config.retrain.max_failures)


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
    return _run_jobs(config, run, progress, "retraining", jobs, settings.concurrent_arms, settings.max_failures)


def _run_jobs(
    config: Config,
    run: RunDirectory,
    progress: Progress,
    label: str,
    jobs: list[TrainingJob],
    concurrent: int | None,
    max_failures: int,
) -> list[Path]:
    unfinished = [job for job in jobs if not job.is_finished(config)]
    for job in jobs:
        if job not in unfinished:
            run.event("train", "job_kept", job=job.name)
    with ray_session(config.training.threads_per_worker):
        num_lanes = min(_num_fitting(config, jobs[0].num_workers), concurrent or len(jobs), max(len(unfinished), 1))
        board = ProgressBoard.remote()
        progress.start(label, sum(job.num_steps + job.anneal_steps for job in unfinished))
        running = [
            run_lane.remote(config, run.path, unfinished[lane::num_lanes], board, f"lane-{lane}", max_failures)
            for lane in range(num_lanes)
            if unfinished
        ]
        while running:
            done, running = ray.wait(running, timeout=0.5)
            notes = ray.get(board.read.remote())
            for key, note in sorted(notes.items()):
                progress.update_line(key, **note)
            progress.update(sum(note["done"] for note in notes.values()))
            ray.get(done)
    return [job.folder / name for job in jobs for name in JOB_FILES]


def _num_fitting(config: Config, num_workers: int) -> int:
    """How many jobs of ``num_workers`` ranks the cluster can hold at once.

    Raises:
        PatterningError: not even one; says what is asked for and what is there.
    """
    there = ray.cluster_resources()
    need = {"CPU": config.training.threads_per_worker * num_workers}
    if resolve_device(config.device) == "cuda":
        need["GPU"] = num_workers
    fitting = min(int(there.get(resource, 0) // amount) for resource, amount in need.items())
    if fitting < 1:
        asked = ", ".join(f"{amount} {resource}" for resource, amount in need.items())
        found = ", ".join(f"{there.get(resource, 0):g} {resource}" for resource in need)
        raise PatterningError(
            f"one training needs {asked}, the Ray cluster has {found}; "
            "lower num_workers or threads_per_worker, or add nodes"
        )
    return fitting
