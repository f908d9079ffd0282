"""What a rank of a training does: jobs one after another. The baseline and every arm go through here."""

from __future__ import annotations

import math

import ray
import torch

from patterning_dist.config import Config
from patterning_dist.errors import PatterningError, first_line
from patterning_dist.heartbeat import beat
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.groups import EngineRank
from patterning_dist.runtime.metrics import Metrics
from patterning_dist.runtime.training.checkpoints import Preempted, State, TrainingCheckpoints, sigterm_saves
from patterning_dist.runtime.training.recorder import Recorder
from patterning_dist.runtime.training.stacked_trainer import StackedTrainer
from patterning_dist.runtime.training.trainer import Trainer
from patterning_dist.runtime.watch import Pulse
from patterning_dist.runtime.workforce import TaskFailed
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.storage.mirror import Location
from patterning_dist.tasks.open import open_task
from patterning_dist.tasks.task import Task
from patterning_dist.training.job import JobGroup


class TrainingProcess(EngineRank):
    """One rank of a training, for any number of them one after another."""

    config: Config  # to be set before the first training

    def __init__(self, ranks: Ranks, device: str, num_threads: int) -> None:
        # Rank 0 may take long to write what the others wait for.
        super().__init__(ranks, device, num_threads, timeout=1800.0)
        self.task: Task | None = None

    def train(self, location: Location, jobs: JobGroup, pulse: Pulse) -> bool:
        """Train jobs, a stack of them at once, from their last checkpoint on; what is finished is kept.

        When the driver asks to stop, the training is saved.

        Raises:
            PatterningError: what the user can put right.
            TaskFailed: anything else that the training raised; it is tried again.
        """
        with pulse.sent():
            return self._train(location, jobs, pulse.board)

    def _train(self, location: Location, jobs: JobGroup, control: ActorHandle) -> bool:
        try:
            location.fetch(*jobs.needs(location.path))
            if not jobs.is_finished(self.config):
                beat()
                self.task = self.task or open_task(self.config, location.path, self.device)
                beat()
                trainer = open_trainer(self.config, self.task, jobs, self.ranks, self.device)
                with sigterm_saves():
                    _train(self.config, location, trainer, control)
        except Preempted:
            ray.actor.exit_actor()  # the machine goes: whoever watches starts another process
        except PatterningError:
            raise
        except Exception as error:
            raise TaskFailed(f"{type(error).__name__}: {first_line(error)}") from error
        return True


def open_trainer(config: Config, task: Task, jobs: JobGroup, ranks: Ranks, device: str) -> Trainer | StackedTrainer:
    """What trains jobs: a stack of networks, or DeepSpeed."""
    if jobs.lead.stack is not None:
        return StackedTrainer(config, task, jobs, device)
    return Trainer(config, task, jobs.lead, ranks, device)


def _train(config: Config, location: Location, trainer: Trainer | StackedTrainer, control: ActorHandle) -> None:
    """Train jobs to their end, or until the driver asks to stop."""
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
            return
    for recorder in recorders:
        recorder.finish(recorder.job.fingerprint(config))
    trainer.engine.destroy()
    checkpoints.finished()
    torch.distributed.barrier()  # the next job may start from what rank 0 has just written


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
