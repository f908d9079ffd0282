"""Training jobs on one rank: models in an engine, what is measured of them, and the steps that DeepSpeed takes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from patterning_dist.config import Config
from patterning_dist.config.deepspeed import deepspeed_config
from patterning_dist.heartbeat import beat
from patterning_dist.response.contrast import GROUP, influence
from patterning_dist.runtime.training.engine import initialize, model_in_pieces
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samples import all_losses, to_device
from patterning_dist.sampling.shard import checkpoint_layers
from patterning_dist.tasks.held_out import held_out_ids, held_out_splits, signed_sums
from patterning_dist.tasks.optimizers import learning_rate_factor, set_learning_rate_factor
from patterning_dist.tasks.task import Task
from patterning_dist.training.batches import WeightedBatches, weighted_loss
from patterning_dist.training.job import JobGroup, TrainingJob


class Member:
    """A model in training, and what is measured of it. All ranks call all methods at the same time.

    Args:
        config: of the run.
        task: on the device of this rank.
        job: what is trained.
        ranks: that share it.
        device: of this rank.
        engine: that the model is in.
        model: to be called; the engine, where that shares it out.
    """

    def __init__(
        self, config: Config, task: Task, job: TrainingJob, ranks: Ranks, device: str, engine: Any, model: nn.Module
    ) -> None:
        self.config, self.task, self.job, self.ranks, self.device = config, task, job, ranks, device
        self.engine, self.model = engine, model
        self.batches = WeightedBatches(job, job.training(config), task)

    def evaluate(self) -> dict[str, float]:
        """The task's metrics, every rank its share."""
        return self.task.evaluate(self.model, self.ranks)

    def observables(self) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """The split losses of the job [nats], on held-out samples that no chain has seen, and columns [sample] of them.

        ``group`` is the document, every other column the influence of a sample on the observable of its name, or on
        the metric, where metrics are taken on as many samples.
        """
        sampling, splits = self.config.sampling, dict(self.job.splits)
        ids = held_out_ids(self.task, self.config.seed, sampling.evaluation_sequences, "realised")
        held_out = held_out_splits(self.task, ids, splits, "realised")
        if held_out is None:
            return {}, {}
        losses = partial(self.task.losses, self.model)
        found = all_losses(losses, held_out.samples, self.ranks, sampling.micro_batch_size, self.device)
        sums = signed_sums(held_out.coefficients, found)
        columns = dict(zip(held_out.names, influence(sums, held_out.shares), strict=True))
        values = dict(zip(held_out.names, sums.sum(axis=(1, 2)).tolist(), strict=True))
        of_metrics = self._outcomes(ids, len(held_out.samples))
        return values, {GROUP: held_out.groups} | of_metrics | columns

    def _outcomes(self, ids: Mapping[str, np.ndarray], num_samples: int) -> dict[str, np.ndarray]:
        """Influences on metrics that are means over these held-out samples, the first of all [sample]."""
        if self.job.training(self.config).evaluation_sequences != self.config.sampling.evaluation_sequences:
            return {}
        found = {}
        for name, values in self.task.outcomes(self.model, ids, self.ranks).items():
            there = ~np.isnan(values)
            padded = np.full(num_samples, np.nan)
            padded[: len(values)][there] = (values[there] - values[there].mean()) / there.sum()
            found[name] = padded
        return found


class Trainer(Member):
    """A job in a DeepSpeed engine.

    The loss that is trained is the loss that susceptibilities are of: the model is in ``eval()`` mode. Dropout is off
    and running statistics stay, so that neither the number of ranks nor a restart changes the numbers.

    Args:
        config, task, job, ranks, device: see ``Member``.
    """

    def __init__(self, config: Config, task: Task, job: TrainingJob, ranks: Ranks, device: str) -> None:
        self.training = job.training(config)
        settings = deepspeed_config(job.deepspeed, self.training.batch_size, ranks.size)
        with model_in_pieces(settings, device):
            model = starting_model(task, job)
        if self.training.gradient_checkpointing:
            checkpoint_layers(model)
        self.optimizer = task.optimizer(model, self.training)
        engine = initialize(model, self.optimizer, settings, device)
        engine.eval()
        super().__init__(config, task, job, ranks, device, engine, engine)
        self.jobs, self.members = JobGroup((job,)), [self]

    def step(self, number: int) -> list[float]:
        """One optimizer step on the global batch; loss under the weights [member], nats, see ``weighted_loss``."""
        job, engine = self.job, self.engine
        warmup = self.training.warmup_steps
        factor = learning_rate_factor(number, job.num_steps, warmup, job.anneal_steps)
        set_learning_rate_factor(self.optimizer, job.rate_factor * factor)
        ids, weights, expected_weight = self.batches(number)
        mine, micro_batches = slice(*self.ranks.share(len(ids))), engine.gradient_accumulation_steps()
        found = []
        for part, part_weights in zip(
            np.array_split(ids[mine], micro_batches), np.array_split(weights[mine], micro_batches), strict=True
        ):
            beat()
            losses, rho = self.losses(part, number), torch.from_numpy(part_weights).to(self.device)
            loss = weighted_loss(losses, rho, expected_weight, self.ranks.size)
            # The engine divides by the number of micro-batches; the loss is already a share of the whole batch.
            engine.backward(loss * micro_batches)
            engine.step()
            found.append(loss.detach())
        return [self.ranks.sum(torch.stack(found).double().sum()).item() / self.ranks.size]

    def losses(self, ids: np.ndarray, step: int = 0) -> torch.Tensor:
        """Losses of training samples as a step has them, differentiable."""
        batch = to_device(self.batches.samples(step)[torch.from_numpy(ids)], self.device)
        return self.task.losses(self.engine, batch)

    def micro_batch_losses(self) -> torch.Tensor:
        """Losses of as many samples as one backward pass is of."""
        return self.losses(np.arange(self.engine.train_micro_batch_size_per_gpu()) % len(self.task.train))


def starting_model(task: Task, job: TrainingJob) -> nn.Module:
    """The model at the start of a job, whole."""
    return task.build(job.seed) if job.start is None else task.load(job.start, Ranks())
