"""Training jobs on the cluster: as many side by side as fit, each a Ray Train ``TorchTrainer``."""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, WorkerCrashedError

from patterning_dist.config import Config
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.boards import job_control
from patterning_dist.runtime.environment import ray_session, resolve_device
from patterning_dist.runtime.resources import training_resources
from patterning_dist.storage.run import RunDirectory
from patterning_dist.training.job import TrainingJob, grouped

# Of the 30 seconds that a preempted driver has, those in which trainings may save where they are.
_SECONDS_TO_SAVE = 15.0
_SECONDS_TO_ASK = 3.0


def run_jobs(
    config: Config, run: RunDirectory, jobs: list[TrainingJob], label: str, progress: Progress, concurrent: int | None
) -> None:
    """Train all jobs, shared out over queues; the jobs and stacks of a queue follow each other in one set of workers.

    Whatever ends this early, Ctrl-C and preemption included, the trainings under way get some seconds to save where
    they are.

    Args:
        config: of the run.
        run: directory of the run, whose folders hold those of the jobs.
        jobs: all with the same number of ranks.
        label: for the progress display, which shows a line a job.
        progress: the display.
        concurrent: queues at most; None: what the cluster holds.

    Raises:
        PatterningError: the cluster cannot hold even one job, a training failed in a way the user can mend, or its
            workers died again and again.
    """
    assert config.training is not None
    groups = grouped(jobs)
    with ray_session(config.training.threads_per_worker):
        need = training_resources(config, resolve_device(config.device), groups[0].lead.num_workers)
        num_queues = need.at_once(len(groups), concurrent).number
        control, heard = job_control(), set[str]()
        progress.start(label, sum(job.total_steps for job in jobs))
        start = _run_queue.options(max_retries=config.max_training_failures).remote
        arguments = {
            "config": config,
            "location": run.location,
            "control": control,
        }
        running = [start({"groups": groups[n::num_queues], **arguments}, f"queue-{n}") for n in range(num_queues)]
        try:
            while running:
                done, running = ray.wait(running, timeout=0.5)
                notes = ray.get(control.read.remote())
                for key, note in sorted(notes.items()):
                    progress.update_line(key, **note)
                progress.update(sum(note["done"] for note in notes.values()))
                _pass_on(control, heard, run, progress)
                ray.get(done)
        except (WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
            raise PatterningError(
                f"{label}: the process that watches over a training died again and again "
                f"({str(error).strip().splitlines()[0]}); look for memory or node failures, and run the same command "
                "again to go on from the last checkpoints"
            ) from error
        finally:
            if running:
                with contextlib.suppress(RayError, PatterningError):  # the error on its way out says more
                    ray.get(control.stop.remote(), timeout=_SECONDS_TO_ASK)
                    ray.wait(running, num_returns=len(running), timeout=_SECONDS_TO_SAVE)
                    _pass_on(control, heard, run, progress)


def _pass_on(control: ActorHandle, heard: set[str], run: RunDirectory, progress: Progress) -> None:
    """Record what trainings have to say: Ctrl-C may come at any place in here, and this is called again then.

    Nothing is lost. What was written when Ctrl-C came, and not yet marked as heard, is written twice.
    """
    messages = ray.get(control.messages.remote(heard))
    heard.clear()
    for name, (kind, text, fields) in messages.items():
        run.event("train", kind, text=text, **fields)
        heard.add(name)
        progress.say(text)


@ray.remote(num_cpus=0)
def _run_queue(arguments: dict[str, Any], name: str) -> None:
    # Ray Train takes a second to import, which the processes of other stages need not spend.
    from patterning_dist.runtime.training.queue import run_queue

    run_queue(arguments, name)
