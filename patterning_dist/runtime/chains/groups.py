"""Chain groups: one chain at a time on several ranks, each a Ray actor with its part of the model."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from patterning_dist.config import SamplingConfig
from patterning_dist.progress import Progress
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.chains.attempt import MakeStudy, Outcome, run_chain
from patterning_dist.runtime.chains.pushes import ChainTask
from patterning_dist.runtime.environment import RANK_ENVIRONMENT, prepare_process
from patterning_dist.runtime.groups import PLACEMENT_TIMEOUT, GroupRank, RankGroup, rank_groups
from patterning_dist.runtime.model_workers import study_workers
from patterning_dist.runtime.resources import sampling_resources
from patterning_dist.runtime.watch import Pulse
from patterning_dist.runtime.workforce import Workforce
from patterning_dist.sampling.ranks import Ranks


@ray.remote
class ChainRank(GroupRank):
    """One rank of a chain group."""

    timeout = timedelta(minutes=10)  # rank 0 may wait for the aggregator while the others wait for rank 0

    def __init__(self, ranks: Ranks, sampling: SamplingConfig, device: str) -> None:
        prepare_process(sampling.threads_per_worker)
        os.environ["LOCAL_RANK"] = "0"  # Ray shows every actor its own GPU only
        self.ranks, self.device = ranks, device

    def open_study(self, make_study: MakeStudy, host: str, port: int) -> str:
        """Join the process group, then load this rank's part of the study; returns the address of the node."""
        node = self.join(host, port)
        self.study = make_study(self.device, self.ranks)
        return node

    def chain(self, task: ChainTask, shards: list[ActorHandle], pulse: Pulse) -> Outcome | None:
        """Take part in a chain; rank 0 returns how it ended, see ``run_chain``."""
        with pulse.sent():
            return run_chain(self.study, self.ranks, task, shards, pulse.board)


@ray.remote(num_cpus=0)
class ChainGroup(RankGroup):
    """The ranks of a chain; used like a ``ModelWorker``.

    Args:
        number: of the group, for messages.
        placement, placement_timeout: see ``RankGroup``.
        make_study: opens the study on every rank.
        sampling: section of the experiment.
        device: of the ranks.
    """

    def __init__(
        self,
        number: int,
        placement: PlacementGroup,
        make_study: MakeStudy,
        sampling: SamplingConfig,
        device: str,
        placement_timeout: float = PLACEMENT_TIMEOUT,
    ) -> None:
        need = sampling_resources(sampling, device, sampling.ranks_per_chain)
        super().__init__(f"chain group {number}", placement, need, placement_timeout)
        self.make_study, self.sampling, self.device = make_study, sampling, device

    def make_rank(self, ranks: Ranks, options: dict[str, Any]) -> ActorHandle:
        """See ``RankGroup``."""
        actor = ChainRank.options(runtime_env={"env_vars": RANK_ENVIRONMENT}, **options)
        return actor.remote(ranks, self.sampling, self.device)

    def open_rank(self, rank: ActorHandle, host: str, port: int) -> ray.ObjectRef:
        """See ``RankGroup``."""
        return rank.open_study.remote(self.make_study, host, port)

    def chain(self, task: ChainTask, shards: list[ActorHandle], pulse: Pulse) -> Outcome:
        """Run one chain on all ranks; raises as ``everywhere``."""
        self.start()
        return self._together(f"in {task.key}", [rank.chain.remote(task, shards, pulse) for rank in self.ranks])[0]


def chain_workers(
    make_study: MakeStudy, sampling: SamplingConfig, device: str, num_tasks: int, progress: Progress
) -> Workforce:
    """Who runs the chains: workers, or chain groups where a chain's model is shared by several ranks.

    Raises:
        PatterningError: the cluster cannot hold one.
    """
    if sampling.ranks_per_chain == 1:
        return study_workers(make_study, sampling, device, num_tasks, progress)

    def make_group(number: int, placement: PlacementGroup) -> ActorHandle:
        return ChainGroup.remote(number, placement, make_study, sampling, device)

    need = sampling_resources(sampling, device, sampling.ranks_per_chain)
    return rank_groups(make_group, need, num_tasks, sampling.workers, progress)
