"""What a Ray Train worker does: training jobs one after another. The baseline and every arm go through here."""

from __future__ import annotations

import math
from typing import Any

import torch

from patterning_dist.config import Config
from patterning_dist.errors import PatterningError
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.environment import prepare_process, resolve_device
from patterning_dist.runtime.metrics import Metrics
from patterning_dist.runtime.training.checkpoints import State, TrainingCheckpoints
from patterning_dist.runtime.training.recorder import Recorder
from patterning_dist.runtime.training.stacked_trainer import StackedTrainer
from patterning_dist.runtime.training.trainer import Trainer
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.storage.mirror import Location
from patterning_dist.tasks.open import open_task
from patterning_dist.tasks.task import Task
from patterning_dist.training.job import JobGroup


def train_on_worker(arguments: dict[str, Any]) -> None:
    """The loop of a Ray Train worker: its jobs one after another, stacks of them at once, finished ones skipped.

    A training goes on from its checkpoint. When the driver asks to stop, the one under way is saved and the rest
    is left.

    Args:
        arguments: config, location (of the run), groups (of jobs), control.

    Raises:
        Preempted: a rank got SIGTERM; the training under way is saved.
    """
    config, location, control = (arguments[key] for key in ("config", "location", "control"))
    prepare_process(config.training.threads_per_worker)
    ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    device, task = resolve_device(config.device), None
    for jobs in arguments["groups"]:
        location.fetch(*jobs.needs(location.path))
        if jobs.is_finished(config):
            continue
        task = task or open_task(config, location.path, device)
        if not _train(config, location, open_trainer(config, task, jobs, ranks, device), control):
            return


def open_trainer(config: Config, task: Task, jobs: JobGroup, ranks: Ranks, device: str) -> Trainer | StackedTrainer:
    """What trains jobs: a stack of networks, or DeepSpeed."""
    if jobs.lead.stack is not None:
        return StackedTrainer(config, task, jobs, device)
    return Trainer(config, task, jobs.lead, ranks, device)


def _train(config: Config, location: Location, trainer: Trainer | StackedTrainer, control: ActorHandle) -> bool:
    """Train jobs to their end; False if they were stopped on the way."""
    job, fingerprint = trainer.jobs.lead, trainer.jobs.fingerprint(config)
    recorders = [Recorder(m, location, control, Metrics(run=config.name, arm=m.job.name)) for m in trainer.members]
    checkpoints = TrainingCheckpoints(job, fingerprint, location.path, location.storage, control, trainer.device)
    if (kept := checkpoints.restore(trainer.engine)) is not None:
        for recorder, (shared, own) in zip(recorders, kept["recorders"], strict=True):
            recorder.load_state_dict(shared, own, kept["step"])
    else:
        for recorder in recorders:
            recorder.evaluate(0, float("nan"))
            recorder.save("initial")

    def states() -> State:
        every = [recorder.state_dict() for recorder in recorders]
        return [shared for shared, _ in every], [own for _, own in every]

    for step in range(kept["step"] if kept else 0, job.total_steps):
        for recorder, loss in zip(recorders, trainer.step(step), strict=True):
            _record(recorder, step, loss)
        if step + 1 < job.total_steps and checkpoints.after_step(trainer.engine, step + 1, states):
            return False
    for recorder in recorders:
        recorder.finish(recorder.job.fingerprint(config))
    trainer.engine.destroy()
    checkpoints.finished()
    torch.distributed.barrier()  # the next job may start from what rank 0 has just written
    return True


def _record(recorder: Recorder, step: int, loss: float) -> None:
    """What is written down of a step."""
    job, done = recorder.job, step + 1
    if not math.isfinite(loss):
        raise PatterningError(
            f"{job.name}: the training loss became {loss} at step {step}; lower training.learning_rate or "
            "training.matrix_learning_rate, or lengthen training.warmup_steps"
        )
    recorder.note(done, loss)
    if done % job.evaluate_every == 0 or done in (job.num_steps, job.total_steps):
        recorder.evaluate(done, loss)
    if done == job.num_steps and job.anneal_steps:
        recorder.save("raw")
    # The annealed checkpoint is the mean of the last half of the annealing.
    if step >= job.num_steps + job.anneal_steps // 2 and job.anneal_steps:
        recorder.add_to_average()
