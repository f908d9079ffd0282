"""Actors that hold the subjects of an experiment: they run chains, and whatever else is asked of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from patterning_dist.config import SamplingConfig
from patterning_dist.progress import Progress
from patterning_dist.runtime.actor import Actor, ActorHandle
from patterning_dist.runtime.chains.attempt import ChainStudy, Outcome, run_chain
from patterning_dist.runtime.chains.pushes import ChainTask
from patterning_dist.runtime.environment import prepare_process
from patterning_dist.runtime.resources import sampling_resources
from patterning_dist.runtime.workforce import Workforce
from patterning_dist.sampling.ranks import Ranks

Result = dict[str, Any]  # of a durable task: arrays, and values that JSON has
MakeStudy = Callable[[str, Ranks], ChainStudy]  # (device, ranks) -> study, in the process that is to hold it


@ray.remote
class ModelWorker(Actor):
    """One process with a study loaded, for any number of tasks one after another."""

    def __init__(self, sampling: SamplingConfig, device: str) -> None:
        prepare_process(sampling.threads_per_worker)
        self.device = device

    def open_study(self, make_study: MakeStudy) -> None:
        """Load the study; what the user can put right is raised here."""
        self.study = make_study(self.device, Ranks())

    def chain(self, task: ChainTask, shards: list[ActorHandle], board: ActorHandle) -> Outcome | None:
        """See ``run_chain``."""
        return run_chain(self.study, Ranks(), task, shards, board)


def model_workers(
    make_study: MakeStudy, sampling: SamplingConfig, device: str, num_tasks: int, progress: Progress
) -> Workforce:
    """As many workers as the configuration or the cluster allows, at most one a task.

    Raises:
        PatterningError: the cluster cannot hold one worker.
    """
    need = sampling_resources(sampling, device)

    def start() -> tuple[ActorHandle, ray.ObjectRef]:
        worker = ModelWorker.options(**need.options).remote(sampling, device)
        return worker, worker.open_study.remote(make_study)

    return Workforce(start, need.at_once(num_tasks, sampling.workers).number, need, progress)
