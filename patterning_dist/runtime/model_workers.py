"""Processes that hold a model, for one stage after another: they run chains, train, and do what else is asked of it."""

from __future__ import annotations

import gc
from typing import Any

import ray
import torch

from patterning_dist.config import Config, SamplingConfig
from patterning_dist.progress import Progress
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.chains.attempt import ChainStudy, MakeStudy, Outcome, run_chain
from patterning_dist.runtime.chains.pushes import ChainTask
from patterning_dist.runtime.environment import prepare_process
from patterning_dist.runtime.resources import Resources, sampling_resources
from patterning_dist.runtime.spares import SPARES
from patterning_dist.runtime.training.worker import TrainingProcess
from patterning_dist.runtime.watch import Pulse
from patterning_dist.runtime.workforce import Workforce
from patterning_dist.sampling.ranks import Ranks


@ray.remote
class ModelWorker(TrainingProcess):
    """One process for any number of tasks one after another; a workforce opens in it what its tasks are about."""

    study: ChainStudy | None = None

    def __init__(self, device: str) -> None:
        super().__init__(Ranks(), device, num_threads=1)  # until something is opened

    def open_study(self, num_threads: int, make_study: MakeStudy) -> None:
        """Load a study; what the user can put right is raised here."""
        _clear(self, num_threads)
        self.study = make_study(self.device, self.ranks)

    def open_training(self, num_threads: int, config: Config) -> None:
        """Be ready to train, as a group of one."""
        _clear(self, num_threads)
        self.config = config
        self.be_alone()

    def chain(self, task: ChainTask, shards: list[ActorHandle], pulse: Pulse) -> Outcome | None:
        """See ``run_chain``."""
        assert self.study is not None
        with pulse.sent():
            return run_chain(self.study, self.ranks, task, shards, pulse.board)


def _clear(worker: Any, num_threads: int) -> None:
    """Give back what the work before held; threads for the work to come."""
    prepare_process(num_threads)
    if worker.study is worker.task is None:
        return
    worker.study = worker.task = None
    gc.collect()
    if worker.device == "cuda":
        torch.cuda.empty_cache()


def model_workers(
    need: Resources,
    num_tasks: int,
    limit: int | None,
    device: str,
    progress: Progress,
    opening: str,
    *arguments: Any,
) -> Workforce:
    """Workers of one process each: those that an earlier stage has left, and new ones.

    Args:
        need: of a worker.
        num_tasks: that there are; at most one worker a task.
        limit: of workers; None: what the cluster holds.
        device: of the workers.
        progress: hears what is waited for.
        opening: method of ``ModelWorker`` that opens what the tasks are about.
        arguments: of this method.

    Raises:
        PatterningError: the cluster cannot hold one worker.
    """
    number = need.at_once(num_tasks, limit).number
    spares = SPARES.take(need, number)

    def start() -> tuple[ActorHandle, ray.ObjectRef]:
        worker = spares.pop() if spares else ModelWorker.options(**need.options).remote(device)
        return worker, getattr(worker, opening).remote(*arguments)

    return Workforce(start, number, need, progress, keep=lambda worker: SPARES.keep(need, worker))


def study_workers(
    make_study: MakeStudy, sampling: SamplingConfig, device: str, num_tasks: int, progress: Progress
) -> Workforce:
    """Workers with a study open, as many as ``sampling.workers`` or the cluster allows; raises as ``model_workers``."""
    need, num_threads = sampling_resources(sampling, device), sampling.threads_per_worker
    return model_workers(need, num_tasks, sampling.workers, device, progress, "open_study", num_threads, make_study)
