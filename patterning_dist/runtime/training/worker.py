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
from patterning_dist.runtime.training.checkpoints import TrainingCheckpoints
from patterning_dist.runtime.training.recorder import Recorder
from patterning_dist.runtime.training.trainer import Trainer
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.storage.mirror import Place
from patterning_dist.tasks.open import open_task


def train_on_worker(arguments: dict[str, Any]) -> None:
    """The loop of a Ray Train worker: its jobs one after another, finished ones skipped.

    A job goes on from its training checkpoint. When the driver asks to stop, the one under way is saved and the rest
    is left.

    Args:
        arguments: config, place (of the run), jobs, control.

    Raises:
        Preempted: a rank got SIGTERM; the job under way is saved.
    """
    config, place, control = (arguments[key] for key in ("config", "place", "control"))
    prepare_process(config.training.threads_per_worker)
    ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    device, task = resolve_device(config.device), None
    for job in arguments["jobs"]:
        place.fetch(*job.needs(place.path))
        if job.is_finished(config):
            continue
        task = task or open_task(config, place.path, device)
        if not _train(config, place, Trainer(config, task, job, ranks, device), control):
            return


def _train(config: Config, place: Place, trainer: Trainer, control: ActorHandle) -> bool:
    """Train one job to its end; False if it was stopped on the way."""
    job = trainer.job
    fingerprint = job.fingerprint(config)
    recorder = Recorder(trainer, place, control, Metrics(run=config.name, arm=job.name))
    checkpoints = TrainingCheckpoints(job, fingerprint, place.path, place.storage, control, trainer.device)
    if (kept := checkpoints.restore(trainer.engine)) is not None:
        recorder.load_state_dict(kept["recorder"], kept["step"])
    else:
        recorder.evaluate(0, float("nan"))
        recorder.save("initial")
    for step in range(kept["step"] if kept else 0, job.total_steps):
        loss = trainer.step(step)
        if not math.isfinite(loss):
            raise PatterningError(
                f"{job.name}: the training loss became {loss} at step {step}; lower training.learning_rate or "
                "training.matrix_learning_rate, or lengthen training.warmup_steps"
            )
        done = step + 1
        recorder.note(done, loss)
        if done % job.evaluate_every == 0 or done in (job.num_steps, job.total_steps):
            recorder.evaluate(done, loss)
        if done == job.num_steps and job.anneal_steps:
            recorder.save("raw")
        # The annealed checkpoint is the mean of the last half of the annealing.
        if step >= job.num_steps + job.anneal_steps // 2 and job.anneal_steps:
            recorder.add_to_average()
        if done < job.total_steps and checkpoints.after_step(trainer.engine, done, recorder.state_dict):
            return False
    recorder.finish(fingerprint)
    trainer.engine.destroy()
    checkpoints.finished()
    torch.distributed.barrier()  # the next job may start from what rank 0 has just written
    return True
