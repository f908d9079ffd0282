"""Training jobs on the cluster: as many side by side as fit."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence

import ray
from ray.exceptions import RayError

from patterning_dist.config import Config
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.boards import job_control
from patterning_dist.runtime.environment import ray_session, resolve_device
from patterning_dist.runtime.training.checkpoints import newest_step
from patterning_dist.runtime.training.groups import training_workers
from patterning_dist.runtime.watch import Watch
from patterning_dist.runtime.workforce import Call, Loss
from patterning_dist.storage.run import RunDirectory
from patterning_dist.training.job import JobGroup, TrainingJob, grouped

# Of the 30 seconds that a preempted driver has, those in which trainings may save where they are.
_SECONDS_TO_SAVE = 15.0
_SECONDS_TO_ASK = 3.0


def run_jobs(
    config: Config, run: RunDirectory, jobs: list[TrainingJob], label: str, progress: Progress, concurrent: int | None
) -> None:
    """Train all jobs; workers take the jobs, and stacks of them, one after another.

    Whatever ends this early, Ctrl-C and preemption included, the trainings under way get some seconds to save where
    they are.

    Args:
        config: of the run.
        run: directory of the run, whose folders hold those of the jobs.
        jobs: all with the same number of ranks.
        label: for the progress display, which shows a line a job.
        progress: the display.
        concurrent: trainings at once at most; None: what the cluster holds.

    Raises:
        PatterningError: the cluster cannot hold even one job, a training failed in a way the user can mend, or its
            workers died again and again.
    """
    assert config.training is not None
    groups = grouped(jobs)
    with ray_session(config.training.threads_per_worker):
        control, heard = job_control(), set[str]()
        num_ranks, device = groups[0].lead.num_workers, resolve_device(config.device)
        with training_workers(config, device, num_ranks, len(groups), concurrent, progress) as workers:
            progress.start(label, sum(job.total_steps for job in jobs))

            def stalled(text: str) -> None:
                run.event("train", "stalled", text=text)
                progress.say(text)

            watch = Watch(control, config.sampling.progress_timeout, stalled)

            def poll(results: object) -> None:
                for key, note in sorted(watch.notes.items()):
                    progress.update_line(key, **note)
                progress.update(sum(note["done"] for note in watch.notes.values()))
                _pass_on(control, heard, run, progress)

            def train(group: JobGroup) -> Call:
                return group.lead.name, lambda worker, pulse: worker.train.remote(run.location, group, pulse)

            try:
                workers.run([train(group) for group in groups], poll, watch, _restarts(config, run, groups, progress))
            except BaseException:
                with contextlib.suppress(RayError, PatterningError):  # the error on its way out says more
                    ray.get(control.stop.remote(), timeout=_SECONDS_TO_ASK)
                    workers.wind_down(_SECONDS_TO_SAVE)
                    _pass_on(control, heard, run, progress)
                raise


def _restarts(
    config: Config, run: RunDirectory, groups: Sequence[JobGroup], progress: Progress
) -> Callable[[int, Loss], bool | None]:
    """What is done about a training whose worker died.

    Only restarts without progress count against ``retrain.max_failures``: machines that die every day do not end a
    training of weeks, and one that dies at the same step again and again does. What raises the same error twice from
    the same step on is not tried a third time.
    """
    reached, failures, faults = Counter[int](), Counter[int](), dict[int, tuple[int, str | None]]()

    def restart(index: int, loss: Loss) -> bool | None:
        group, job, reason = groups[index], groups[index].lead, loss.reason
        run.location.fetch(*group.needs(run.path))
        if group.is_finished(config):
            return True
        step = newest_step(run.storage, run.path, job, group.fingerprint(config))
        if loss.fault is not None and faults.get(index) == (step, loss.fault):
            raise PatterningError(
                f"{job.name}: failed twice in the same way after step {step} of {job.total_steps} ({reason}); finished "
                "trainings are kept: mend the cause, and run the same command to go on from there"
            )
        faults[index] = (step, loss.fault)
        failures[index] = 1 if step > reached[index] else failures[index] + 1
        reached[index] = step
        if failures[index] > config.max_training_failures:
            raise PatterningError(
                f"{job.name}: a worker died {failures[index]} times without getting further than step {step} of "
                f"{job.total_steps} ({reason}); finished trainings are kept: look for memory or node failures, raise "
                "retrain.max_failures if machines die often, and run the same command to go on from there"
            )
        text = f"{job.name}: a worker died ({reason}); starting again from step {step} of {job.total_steps}"
        run.event("train", "job_restarted", text=text, job=job.name, step=step)
        progress.say(text)
        return None

    return restart


def _pass_on(control: ActorHandle, heard: set[str], run: RunDirectory, progress: Progress) -> None:
    """Record what trainings have to say: Ctrl-C may come at any place in here, and this is called again then.

    Nothing is lost. What was written when Ctrl-C came, and not yet marked as heard, is written twice.
    """
    try:
        messages = ray.get(control.messages.remote(heard), timeout=_SECONDS_TO_ASK)
    except ray.exceptions.GetTimeoutError:
        return  # asked again; what has been heard is forgotten once, however often it is said
    heard.clear()
    for name, (kind, text, fields) in messages.items():
        run.event("train", kind, text=text, **fields)
        heard.add(name)
        progress.say(text)
