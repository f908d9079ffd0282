"""Pieces of training, timed: optimizer steps with as many engines side by side as the run will have, and a
training of a few steps from start to end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from patterning_dist.config import Config
from patterning_dist.response.cost import Seconds
from patterning_dist.runtime.probe.chains import SavedBytes, process_bytes, run_together
from patterning_dist.runtime.probe.ranks import probe_groups
from patterning_dist.runtime.resources import training_resources
from patterning_dist.runtime.training.worker import open_trainer
from patterning_dist.tasks.open import open_task
from patterning_dist.training.job import JobGroup

# Seconds: how long steps are timed, and how long a process may take for anything at all.
_STEPS_BUDGET, _TIMEOUT = 4.0, 600.0
_MIN_STEPS, _MAX_STEPS = 3, 60


@dataclass(frozen=True)
class StepTimes:
    """Engines side by side: ``num_queues`` trainings at once, an optimizer step, a row of metrics, and their memory."""

    num_queues: int
    step: Seconds
    evaluation: Seconds
    weight_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    process_bytes: int


@dataclass(frozen=True)
class JobTimes:
    """A training, start to end.

    Attributes:
        starting: until the first job begins.
        opening: of a job, with its first row of metrics.
        step, anneal_step: of the optimizer.
        closing: of a job: last metrics and files.
        stopping: from the last file until everything is given back.
    """

    starting: Seconds
    opening: Seconds
    step: Seconds
    anneal_step: Seconds
    closing: Seconds
    stopping: Seconds


def probe_steps(
    config: Config, directory: Path, jobs: JobGroup, device: str, num_groups: int, concurrent: int | None
) -> StepTimes:
    """Time optimizer steps of jobs on as many groups of ranks at once as ``num_groups`` like them will run on.

    Args:
        config: of the run.
        directory: where data/ lies.
        jobs: trained at once; they name the layout, the weights and the seeds.
        device: of the ranks.
        num_groups: how many are to run, side by side where they fit.
        concurrent: how many at once at most; None: what fits.

    Raises:
        PatterningError: the cluster cannot hold one.
    """
    need = training_resources(config, device, jobs.lead.num_workers)
    queues = need.at_once(num_groups, concurrent).number
    with probe_groups([[need.options] * need.num_ranks] * queues, device, need.cpus, _TIMEOUT) as groups:
        run_together(groups, _open_trainer, config, directory, jobs)
        estimates = run_together(groups, _time_steps, 2)
        slowest = max(times[-1] for times in estimates)
        number = int(min(max(_STEPS_BUDGET / slowest, _MIN_STEPS), _MAX_STEPS))
        steps = run_together(groups, _time_steps, number)
        evaluations = run_together(groups, _time_evaluation)
        sizes = run_together(groups, _sizes)
    # Blocks of steps, for a single one varies with what else the machine does.
    blocks = [float(block.mean()) for times in steps for block in np.array_split(np.array(times), 3)]
    weights, optimizer, activations, memory = (max(column) for column in zip(*sizes, strict=True))
    return StepTimes(
        queues, Seconds.measured(blocks), Seconds.measured(evaluations), weights, optimizer, activations, memory
    )


def probe_job(
    config: Config,
    folder: Path,
    run: Callable[[Config], object],
    step: Seconds,
    evaluation: Seconds,
) -> JobTimes:
    """Run a training of a few steps and take its time apart.

    Args:
        config: of the run.
        folder: of the job, where its files appear.
        run: trains with the configuration that it is given.
        step: about the time of one step; it says how many are made.
        evaluation: time of one row of metrics.
    """
    assert config.training is not None
    rows = 3
    every = int(min(max(_STEPS_BUDGET / rows / step.value, 1), _MAX_STEPS // rows))
    annealing = min(every, config.training.anneal_steps)
    training = {"num_steps": rows * every, "anneal_steps": annealing, "evaluate_every": every}
    started = time.time()
    run(config.model_copy(update={"training": config.training.model_copy(update=training)}))
    ended = time.time()
    last = folder / "evaluation.json"
    seconds, finished = json.loads(last.read_text())["seconds"], last.stat().st_mtime
    at = pq.read_table(folder / "metrics.parquet", columns=["seconds"])["seconds"].to_numpy()
    steps = [(b - a - evaluation.value) / every for a, b in pairwise(at[: rows + 1])]
    anneal = [(at[-1] - at[-2] - evaluation.value) / annealing] if annealing else [0.0]
    return JobTimes(
        starting=Seconds.about(max(finished - seconds - started, 0.0), 0.25),
        opening=Seconds.about(at[0], 0.5),
        step=Seconds.measured(steps),
        anneal_step=Seconds.about(max(anneal[0], 0.0), 0.25),
        closing=Seconds.about(seconds - at[-1], 0.5),
        stopping=Seconds.about(max(ended - finished, 0.0), 0.25),
    )


def _open_trainer(rank: Any, config: Config, directory: Path, jobs: JobGroup) -> None:
    task = open_task(config, directory, rank.device)
    rank.trainer = open_trainer(config, task, jobs, rank.ranks, rank.device)
    rank.number = 0


def _time_steps(rank: Any, number: int) -> list[float]:
    """Seconds of each of some optimizer steps."""
    times = []
    for _ in range(number):
        started = time.perf_counter()
        rank.trainer.step(rank.number)
        rank.number += 1
        times.append(time.perf_counter() - started)
    return times


def _time_evaluation(rank: Any) -> float:
    started = time.perf_counter()
    rank.trainer.evaluate()
    return time.perf_counter() - started


def _sizes(rank: Any) -> tuple[int, int, int, int]:
    """Bytes of this rank's weights and optimizer state, of what is kept for the backward pass, and of the process."""
    trainer = rank.trainer
    engine = trainer.engine
    pieces = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    weights = sum(p.numel() * p.element_size() for p in pieces)
    states = trainer.optimizer.state.values()
    optimizer = sum(t.numel() * t.element_size() for s in states for t in s.values() if isinstance(t, torch.Tensor))
    activations = SavedBytes(engine.module.parameters())
    with activations.watch():
        trainer.micro_batch_losses()
    return weights, optimizer, activations.total, process_bytes(rank)
