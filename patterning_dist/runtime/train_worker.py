"""What a Ray Train worker does: training jobs with DeepSpeed engines. The baseline and every arm go through here."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from ray.actor import ActorHandle
from safetensors.torch import load_file, save_file

from patterning_dist.config import Config
from patterning_dist.data.sampler import permutation
from patterning_dist.data.tokens import TokenDataset
from patterning_dist.errors import PatterningError
from patterning_dist.files import atomic_path, write_json, write_parquet
from patterning_dist.models.attention import build_model
from patterning_dist.models.losses import token_losses
from patterning_dist.runtime.engine import copy_weights, deepspeed_config, initialize, whole_parameters
from patterning_dist.runtime.environment import prepare_process, resolve_device
from patterning_dist.training.job import TrainingJob, WeightedBatches
from patterning_dist.training.loss import weighted_loss
from patterning_dist.training.metrics import EvaluationSet, evaluate
from patterning_dist.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rate_factor

_EVALUATION_STREAM = 0x6576616C
_NOTE_EVERY = 0.5


def train_on_worker(arguments: dict[str, Any]) -> None:
    """The loop of a Ray Train worker: its jobs one after another, finished ones skipped.

    Args:
        arguments: config, directory (of the run), jobs, board.
    """
    config: Config = arguments["config"]
    prepare_process(config.training.threads_per_worker)
    for job in arguments["jobs"]:
        if not job.is_finished(config):
            _train(config, Path(arguments["directory"]), job, arguments["board"])


def _train(config: Config, directory: Path, job: TrainingJob, board: ActorHandle) -> None:
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    device = resolve_device(config.device)
    pool = TokenDataset(job.pool)
    validation = TokenDataset(directory / "data" / "validation.parquet")
    held_out = permutation(config.seed, _EVALUATION_STREAM, validation.num_sequences)
    evaluation = EvaluationSet.build(
        validation.tokens(held_out[: config.training.evaluation_sequences]), pool.vocabulary_size
    )
    batches = WeightedBatches(job, config, pool)
    model = build_model(config.model, pool.vocabulary_size, pool.context_length, seed=job.seed)
    if job.start is not None:
        model.load_state_dict(load_file(job.start))
    model.to(device)
    optimizer = build_optimizer(model, config.training)
    settings = deepspeed_config(job.deepspeed, config.training.batch_size, num_ranks)
    engine = initialize(model, optimizer, settings, device)
    plain = build_model(config.model, pool.vocabulary_size, pool.context_length).to(device)
    recorder = _Recorder(job, board, evaluation, rank, plain)
    recorder.evaluate(engine, 0, float("nan"))
    with whole_parameters(engine) as module:
        recorder.save(copy_weights(module), "initial")
    total = job.num_steps + job.anneal_steps
    average: dict[str, torch.Tensor] = {}
    for step in range(total):
        factor = learning_rate_factor(step, job.num_steps, config.training.warmup_steps, job.anneal_steps)
        set_learning_rate_factor(optimizer, factor)
        loss = _step(engine, *batches(step), rank, num_ranks, device)
        if not math.isfinite(loss):
            raise PatterningError(
                f"{job.name}: the training loss became {loss} at step {step}; lower training.learning_rate or "
                "training.matrix_learning_rate, or lengthen training.warmup_steps"
            )
        recorder.note(step + 1, total, loss)
        if (step + 1) % job.evaluate_every == 0 or step + 1 in (job.num_steps, total):
            recorder.evaluate(engine, step + 1, loss)
        if step + 1 == job.num_steps and job.anneal_steps:
            with whole_parameters(engine) as module:
                recorder.save(copy_weights(module), "raw")
        # The annealed checkpoint is the mean of the last half of the annealing.
        if step >= job.num_steps + job.anneal_steps // 2 and job.anneal_steps:
            with whole_parameters(engine) as module:
                for name, w in copy_weights(module).items():
                    average[name] = average[name] + w if name in average else w
    with whole_parameters(engine) as module:
        num_averaged = job.anneal_steps - job.anneal_steps // 2
        final = {n: w / num_averaged for n, w in average.items()} if average else copy_weights(module)
    engine.destroy()
    recorder.finish(final, config, batches)


def _step(engine: Any, tokens: np.ndarray, weights: np.ndarray, rank: int, num_ranks: int, device: str) -> float:
    """One optimizer step on the global batch; this rank's share of the loss, nats."""
    global_weight = max(float(weights.sum(dtype=np.float64)), 1e-12)
    mine = slice(rank * len(tokens) // num_ranks, (rank + 1) * len(tokens) // num_ranks)
    micro_batches = engine.gradient_accumulation_steps()
    total = 0.0
    for part_tokens, part_weights in zip(
        np.array_split(tokens[mine], micro_batches), np.array_split(weights[mine], micro_batches), strict=True
    ):
        batch = torch.from_numpy(part_tokens).to(device)
        losses = token_losses(engine(batch[:, :-1]), batch)
        loss = weighted_loss(losses, torch.from_numpy(part_weights).to(device), global_weight, num_ranks)
        # The engine divides by the number of micro-batches; the loss is already a share of the whole batch.
        engine.backward(loss * micro_batches)
        engine.step()
        total += loss.item()
    return total


class _Recorder:
    """Rank 0's files and notes; every rank calls it, so that gathering weights stays collective.

    Metrics are taken of a plain copy of the model: under ZeRO stage 3 the engine's own forward pass is collective, and
    rank 0 alone would wait for ever.
    """

    def __init__(
        self, job: TrainingJob, board: ActorHandle, evaluation: EvaluationSet, rank: int, plain: torch.nn.Module
    ) -> None:
        self.job, self.board, self.evaluation, self.rank = job, board, evaluation, rank
        self.plain = plain
        self.started, self.noted = time.monotonic(), 0.0
        self.rows: list[dict[str, float]] = []

    def note(self, done: int, total: int, loss: float) -> None:
        if self.rank == 0 and (time.monotonic() - self.noted > _NOTE_EVERY or done == total):
            self.noted = time.monotonic()
            self.board.note.remote(self.job.name, done=done, total=total, loss=loss, healthy=bool(np.isfinite(loss)))

    def evaluate(self, engine: Any, step: int, loss: float) -> None:
        with whole_parameters(engine) as module:
            weights = copy_weights(module)
        if self.rank == 0:
            self.plain.load_state_dict(weights)
            row = evaluate(self.plain, self.evaluation)
            seconds = time.monotonic() - self.started
            self.rows.append({"step": step, "train_loss": loss, **row, "seconds": seconds})

    def save(self, weights: dict[str, torch.Tensor], name: str) -> None:
        if self.rank == 0:
            with atomic_path(self.job.folder / f"{name}.safetensors") as path:
                save_file(weights, path)

    def finish(self, weights: dict[str, torch.Tensor], config: Config, batches: WeightedBatches) -> None:
        if self.rank != 0:
            return
        self.save(weights, "model")
        write_parquet(self.job.folder / "metrics.parquet", pa.Table.from_pylist(self.rows))
        self.plain.load_state_dict(weights)
        report = {
            **evaluate(self.plain, self.evaluation),
            "num_missing_weights": batches.joined.num_missing,
            "num_joined_weights": batches.joined.num_joined,
            "seconds": time.monotonic() - self.started,
            "fingerprint": self.job.fingerprint(config),
        }
        write_json(self.job.folder / "evaluation.json", report)
