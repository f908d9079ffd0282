"""Pieces of training, timed: optimizer steps with as many engines side by side as the run will have, and the start of
Ray Train with a training of a few steps."""

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
from patterning_dist.data.tokens import TokenDataset
from patterning_dist.models.attention import build_model
from patterning_dist.models.losses import token_losses
from patterning_dist.response.cost import Seconds
from patterning_dist.runtime.probe.chains import SavedBytes, process_bytes, run_together
from patterning_dist.runtime.probe.ranks import probe_groups
from patterning_dist.runtime.resources import training_resources
from patterning_dist.runtime.training.engine import copy_weights, deepspeed_config, initialize, whole_parameters
from patterning_dist.training.job import TrainingJob, WeightedBatches
from patterning_dist.training.loss import weighted_loss
from patterning_dist.training.metrics import EvaluationSet, evaluate
from patterning_dist.training.optimizer import build_optimizer

# Seconds: how long steps are timed, and how long a process may take for anything at all.
_STEPS_BUDGET, _TIMEOUT = 4.0, 600.0
_MIN_STEPS, _MAX_STEPS = 3, 60


@dataclass(frozen=True)
class StepTimes:
    """Engines side by side: ``num_lanes`` trainings at once, an optimizer step, a row of metrics, and their memory."""

    num_lanes: int
    step: Seconds
    evaluation: Seconds
    weight_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    process_bytes: int


@dataclass(frozen=True)
class JobTimes:
    """A training through Ray Train, start to end.

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


def probe_steps(config: Config, directory: Path, job: TrainingJob, device: str, num_jobs: int) -> StepTimes:
    """Time optimizer steps of a job on as many groups of ranks at once as ``num_jobs`` of them will run on.

    Args:
        config: of the run.
        directory: where data/ lies.
        job: names the layout, the weights and the seed.
        device: of the ranks.
        num_jobs: how many are to run, side by side where they fit.

    Raises:
        PatterningError: the cluster cannot hold one.
    """
    need = training_resources(config, device, job.num_workers)
    lanes = need.at_once(num_jobs, config.retrain.concurrent_arms).number
    with probe_groups([[need.options] * need.num_ranks] * lanes, device, need.cpus, _TIMEOUT) as groups:
        run_together(groups, _open_engine, config, directory, job)
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
        lanes, Seconds.measured(blocks), Seconds.measured(evaluations), weights, optimizer, activations, memory
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


def _open_engine(rank: Any, config: Config, directory: Path, job: TrainingJob) -> None:
    pool = TokenDataset(job.pool)
    validation = TokenDataset(directory / "data" / "validation.parquet")
    held_out = np.arange(min(config.training.evaluation_sequences, validation.num_sequences))
    rank.evaluation = EvaluationSet.build(validation.tokens(held_out), pool.vocabulary_size)
    rank.batches = WeightedBatches(job, config, pool)
    rank.plain = build_model(config.model, pool.vocabulary_size, pool.context_length).to(rank.device)
    model = build_model(config.model, pool.vocabulary_size, pool.context_length, seed=job.seed).to(rank.device)
    settings = deepspeed_config(job.deepspeed, config.training.batch_size, rank.size)
    rank.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    rank.engine = initialize(model, build_optimizer(model, config.training), settings, rank.device)
    rank.saved = SavedBytes(model.parameters())
    rank.step = 0


def _time_steps(rank: Any, number: int) -> list[float]:
    """Seconds of each of some optimizer steps, as ``runtime.train_worker`` makes them."""
    times = []
    micro_batches = rank.engine.gradient_accumulation_steps()
    for _ in range(number):
        started = time.perf_counter()
        tokens, weights = rank.batches(rank.step)
        mine = slice(rank.rank * len(tokens) // rank.size, (rank.rank + 1) * len(tokens) // rank.size)
        share = max(float(weights.sum(dtype=np.float64)), 1e-12)
        for part, part_weights in zip(
            np.array_split(tokens[mine], micro_batches), np.array_split(weights[mine], micro_batches), strict=True
        ):
            batch = torch.from_numpy(part).to(rank.device)
            with _watched(rank):
                losses = token_losses(rank.engine(batch[:, :-1]), batch)
                loss = weighted_loss(losses, torch.from_numpy(part_weights).to(rank.device), share, rank.size)
            rank.engine.backward(loss * micro_batches)
            rank.engine.step()
            loss.item()
        rank.step += 1
        times.append(time.perf_counter() - started)
    return times


def _watched(rank: Any) -> Any:
    """Counts what the first forward pass keeps; later ones are only timed."""
    return rank.saved.watch() if rank.step == 0 and not rank.saved.total else torch.enable_grad()


def _time_evaluation(rank: Any) -> float:
    started = time.perf_counter()
    with whole_parameters(rank.engine) as module:
        weights = copy_weights(module)
    rank.plain.load_state_dict(weights)
    evaluate(rank.plain, rank.evaluation)
    return time.perf_counter() - started


def _sizes(rank: Any) -> tuple[int, int, int, int]:
    """Bytes of weights, of this rank's optimizer state, of what is kept for the backward pass, and of the process."""
    states = rank.engine.optimizer.state_dict().get("state", {}).values()
    optimizer = sum(t.numel() * t.element_size() for s in states for t in s.values() if isinstance(t, torch.Tensor))
    return rank.weight_bytes, optimizer, rank.saved.total, process_bytes(rank)
