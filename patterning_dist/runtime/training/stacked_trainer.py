"""The seeds of an arm as one stack of networks, each of which takes the steps that DeepSpeed would take with it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from patterning_dist.config import Config, TrainingConfig
from patterning_dist.errors import PatterningError, first_line
from patterning_dist.heartbeat import beat
from patterning_dist.runtime.training.trainer import Member, starting_model
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.tasks.optimizers import PerHeadMuon, learning_rate_factor, set_learning_rate_factor
from patterning_dist.tasks.task import Task
from patterning_dist.training.job import JobGroup
from patterning_dist.training.stack import Mapped, Stack, TorchEngine, stack_networks, stacked_batch
from patterning_dist.training.walk import DEFAULT_CLIPPING

# They move every coordinate, or every matrix of a head, by itself, so that those of several networks can be one tensor.
_OPTIMIZERS = (SGD, Adam, AdamW, PerHeadMuon)


class StackedTrainer:
    """Jobs that differ in seed, start and weights; what a ``Trainer`` is to one of them, in one process.

    Args:
        config, task, device: see ``Member``.
        jobs: of as many steps each.

    Raises:
        PatterningError: see ``stackable_optimizer``.
    """

    def __init__(self, config: Config, task: Task, jobs: JobGroup, device: str) -> None:
        self.training = jobs.jobs[0].training(config)
        self.task, self.jobs, self.device = task, jobs, device
        models = [starting_model(task, job).eval() for job in jobs.jobs]
        self.optimizer = stackable_optimizer(task, models[0], self.training)
        stack = Stack(Mapped(task.losses, models[0]), stack_networks(models)).to(device)
        networks = {parameter: name for name, parameter in models[0].named_parameters()}
        for group in self.optimizer.param_groups:
            group["params"] = [stack.networks[networks[parameter]] for parameter in group["params"]]
        for number, model in enumerate(models):  # each has its own slice of the stack for its weights
            for name, parameter in model.named_parameters():
                parameter.data = stack.networks[name].data[number]
        self.engine = TorchEngine(stack, self.optimizer)
        self.members = [
            Member(config, task, job, Ranks(), device, TorchEngine(model, self.optimizer), model)
            for job, model in zip(jobs.jobs, models, strict=True)
        ]

        if any(member.batches.swapped is not None for member in self.members):
            raise PatterningError(
                f"retrain.engine: the weights of {jobs.jobs[0].name} swap labels, and a stack of networks shares its "
                "samples; set it to deepspeed"
            )

    def step(self, number: int) -> list[float]:
        """One optimizer step of all networks; losses under the weights [member], nats, see ``weighted_loss``."""
        job = self.members[0].job
        factor = learning_rate_factor(number, job.num_steps, self.training.warmup_steps, job.anneal_steps)
        set_learning_rate_factor(self.optimizer, job.rate_factor * factor)
        beat()
        ids, weights, expected_weights = zip(*(member.batches(number) for member in self.members), strict=True)
        losses = self.engine(stacked_batch(self.task.train, np.stack(ids), self.device))
        rho = torch.from_numpy(np.stack(weights)).to(self.device)
        means = (rho * losses).flatten(1).sum(dim=1) / rho.new_tensor(expected_weights)
        self.engine.backward(means.sum())
        self._clip()
        self.engine.step()
        return means.tolist()

    def evaluate(self) -> list[dict[str, float]]:
        """The task's metrics of every network."""
        return [member.evaluate() for member in self.members]

    def micro_batch_losses(self) -> Tensor:
        """Losses of as many samples as one backward pass is of."""
        ids = np.arange(self.training.batch_size) % len(self.task.train)
        return self.engine(stacked_batch(self.task.train, np.stack([ids] * len(self.members)), self.device))

    def _clip(self) -> None:
        """Every network's gradient to the length that DeepSpeed clips it to."""
        parameters = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        squares = [gradient.reshape(len(self.members), -1).square().sum(dim=1) for gradient in gradients]
        factors = (DEFAULT_CLIPPING / (torch.stack(squares).sum(dim=0).sqrt() + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(factors.reshape(-1, *[1] * (gradient.dim() - 1)))


def stackable_optimizer(task: Task, model: nn.Module, settings: TrainingConfig) -> Optimizer:
    """The optimizer of a model that can be one of a stack.

    Raises:
        PatterningError: ``torch.func.vmap`` cannot map over the losses, or the optimizer may mix what is stacked.
    """
    optimizer = task.optimizer(model, settings)
    if type(optimizer) not in _OPTIMIZERS:
        raise PatterningError(
            f"retrain.engine: {type(optimizer).__name__} may take the weights of stacked networks for those of one; "
            "set it to deepspeed"
        )
    try:
        batch = stacked_batch(task.train, np.zeros((1, 2), np.int64), next(model.parameters()).device)
        Mapped(task.losses, model).of({name: p[None] for name, p in model.named_parameters()}, batch, own=True)
    except RuntimeError as error:
        raise PatterningError(
            f"retrain.engine: torch.func.vmap cannot map over this model's losses ({first_line(error)}); set it to "
            "deepspeed"
        ) from None
    return optimizer
