"""Who trains: workers of one process, or groups of ranks where a training is shared by several."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from patterning_dist.config import Config
from patterning_dist.progress import Progress
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.environment import RANK_ENVIRONMENT
from patterning_dist.runtime.groups import PLACEMENT_TIMEOUT, RankGroup, rank_groups
from patterning_dist.runtime.model_workers import model_workers
from patterning_dist.runtime.resources import training_resources
from patterning_dist.runtime.training.worker import TrainingProcess
from patterning_dist.runtime.watch import Pulse
from patterning_dist.runtime.workforce import Workforce
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.storage.mirror import Location
from patterning_dist.training.job import JobGroup


@ray.remote
class TrainingRank(TrainingProcess):
    """One of several ranks that share a training."""

    def __init__(self, ranks: Ranks, device: str, config: Config) -> None:
        assert config.training is not None
        super().__init__(ranks, device, config.training.threads_per_worker)
        self.config = config


@ray.remote(num_cpus=0)
class TrainingGroup(RankGroup):
    """The ranks of a training; used like a ``ModelWorker``.

    Args:
        number: of the group, for messages.
        placement: see ``RankGroup``.
        config: of the run.
        device, num_ranks: of the training.
    """

    def __init__(self, number: int, placement: PlacementGroup, config: Config, device: str, num_ranks: int) -> None:
        need = training_resources(config, device, num_ranks)
        super().__init__(f"training group {number}", placement, need, PLACEMENT_TIMEOUT)
        self.config, self.device = config, device

    def make_rank(self, ranks: Ranks, options: dict[str, Any]) -> ActorHandle:
        """See ``RankGroup``."""
        actor = TrainingRank.options(runtime_env={"env_vars": RANK_ENVIRONMENT}, **options)
        return actor.remote(ranks, self.device, self.config)

    def train(self, location: Location, jobs: JobGroup, pulse: Pulse) -> bool:
        """Train jobs on all ranks; raises as ``everywhere``."""
        self.start()
        calls = [rank.train.remote(location, jobs, pulse) for rank in self.ranks]
        return self._together(f"in {jobs.lead.name}", calls)[0]


def training_workers(
    config: Config, device: str, num_ranks: int, num_tasks: int, limit: int | None, progress: Progress
) -> Workforce:
    """As many as the limit or the cluster allows, at most one a task.

    Args:
        config: of the run.
        device, num_ranks: of every training.
        num_tasks: that there are.
        limit: of trainings at once; None: what the cluster holds.
        progress: hears what is waited for.

    Raises:
        PatterningError: the cluster cannot hold one.
    """
    need = training_resources(config, device, num_ranks)
    if num_ranks > 1:
        return rank_groups(
            lambda number, placement: TrainingGroup.remote(number, placement, config, device, num_ranks),
            need,
            num_tasks,
            limit,
            progress,
        )

    return model_workers(need, num_tasks, limit, device, progress, "open_training", need.cpus, config)
