"""What a Ray Train worker does: training jobs with DeepSpeed engines. The baseline and every arm go through here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from ray.actor import ActorHandle
from safetensors.torch import load_file

from patterning_dist.config import Config
from patterning_dist.data.sampler import permutation
from patterning_dist.data.tokens import TokenDataset
from patterning_dist.errors import PatterningError
from patterning_dist.models.attention import build_model
from patterning_dist.models.losses import token_losses
from patterning_dist.runtime.environment import prepare_process, resolve_device
from patterning_dist.runtime.metrics import training_metrics
from patterning_dist.runtime.training.checkpoints import Safekeeper
from patterning_dist.runtime.training.engine import copy_weights, deepspeed_config, initialize, whole_parameters
from patterning_dist.runtime.training.recorder import Recorder
from patterning_dist.storage.mirror import Place
from patterning_dist.training.job import TrainingJob, WeightedBatches
from patterning_dist.training.loss import weighted_loss
from patterning_dist.training.metrics import EvaluationSet
from patterning_dist.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rate_factor

_EVALUATION_STREAM = 0x6576616C


def train_on_worker(arguments: dict[str, Any]) -> None:
    """The loop of a Ray Train worker: its jobs one after another, finished ones skipped.

    A job goes on from its training checkpoint. When the driver asks to stop, the one under way is saved and the rest
    is left.

    Args:
        arguments: config, place (of the run), jobs, board, control.

    Raises:
        ToldToLeave: a rank got SIGTERM; the job under way is saved.
    """
    config, place = arguments["config"], arguments["place"]
    prepare_process(config.training.threads_per_worker)
    for job in arguments["jobs"]:
        place.fetch(*job.inputs(place.path))
        if not job.is_finished(config) and not _train(job=job, **{k: v for k, v in arguments.items() if k != "jobs"}):
            return


def _train(config: Config, place: Place, job: TrainingJob, board: ActorHandle, control: ActorHandle) -> bool:
    """Train one job to its end; False if it was stopped on the way."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    device = resolve_device(config.device)
    pool = TokenDataset(job.pool)
    validation = TokenDataset(place.path / "data" / "validation.parquet")
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
    fingerprint = job.fingerprint(config)
    recorder = Recorder(job, place, board, training_metrics(config.name, job.name), evaluation, rank, plain)
    safekeeper = Safekeeper(job, fingerprint, place.path, place.storage, control, device)
    if (kept := safekeeper.restore(engine)) is not None:
        recorder.load_state_dict(kept["recorder"], kept["step"])
    else:
        recorder.evaluate(engine, 0, float("nan"))
        with whole_parameters(engine) as module:
            recorder.save(copy_weights(module), "initial")
    total = job.num_steps + job.anneal_steps
    for step in range(kept["step"] if kept else 0, total):
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
                recorder.add_to_average(copy_weights(module))
        if step + 1 < total and safekeeper.after_step(engine, step + 1, recorder.state_dict):
            return False
    with whole_parameters(engine) as module:
        final = copy_weights(module)
    engine.destroy()
    recorder.finish(final, fingerprint, batches)
    safekeeper.finished()
    return True


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
