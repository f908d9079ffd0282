"""Chain groups: one chain at a time on several ranks, each a Ray actor with its part of the model.

The ranks of a group talk through torch.distributed among themselves, and through messages with everybody else. A group
is one failure domain: a process group cannot take a lost rank back, so when one dies all are killed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from patterning_dist.config import SamplingConfig
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.runtime.actor import Actor, ActorHandle
from patterning_dist.runtime.chains.attempt import Outcome, run_chain
from patterning_dist.runtime.chains.pushes import ChainTask
from patterning_dist.runtime.chains.workers import MakeStudy, model_workers
from patterning_dist.runtime.environment import prepare_process
from patterning_dist.runtime.probe.ranks import GroupRank
from patterning_dist.runtime.resources import nodes, sampling_resources
from patterning_dist.runtime.workforce import WorkerLost, Workforce, loss_reason
from patterning_dist.sampling.ranks import Ranks

_PLACEMENT_TIMEOUT = 300.0  # seconds until the resources of a group must have become free
_GRACE = 5.0  # seconds after the first failure, in which the rank that caused it may be found out
# Over that of other workers. Layers are put together and dropped again all the time; kept by the allocator for the next
# one instead of given back, they took three times what a rank holds.
RANK_ENVIRONMENT = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"), str(1 << 20))


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
        self.join(host, port)
        self.study = make_study(self.device, self.ranks)
        return ray.util.get_node_ip_address()

    def chain(self, task: ChainTask, shards: list[ActorHandle], board: ActorHandle) -> Outcome | None:
        """Take part in a chain; rank 0 returns how it ended, see ``run_chain``."""
        return run_chain(self.study, self.ranks, task, shards, board)


@ray.remote(num_cpus=0)
class ChainGroup(Actor):
    """Starts the ranks of a group, and watches all of them; used like a ``ModelWorker``.

    After a failure the next chain restarts them. The ranks go when this actor goes.

    Args:
        number: of the group, for messages.
        placement: a bundle for every rank. It is not made here: Ray would keep it after this actor's death.
        make_study: opens the study on every rank.
        sampling: section of the experiment.
        device: of the ranks.
        placement_timeout: seconds until the placement group must be there.
    """

    def __init__(
        self,
        number: int,
        placement: PlacementGroup,
        make_study: MakeStudy,
        sampling: SamplingConfig,
        device: str,
        placement_timeout: float = _PLACEMENT_TIMEOUT,
    ) -> None:
        self.name, self.placement_timeout = f"chain group {number}", placement_timeout
        self.placement = placement
        self.make_study, self.sampling, self.device = make_study, sampling, device
        self.ranks: list[ActorHandle] = []
        self.nodes: list[str] = []

    def chain(self, task: ChainTask, shards: list[ActorHandle], board: ActorHandle) -> Outcome:
        """Run one chain on all ranks.

        Raises:
            WorkerLost: a rank died; the next chain restarts the group.
            PatterningError: the ranks found no room in time, or one refused what the user can put right.
            RuntimeError: a rank raised something else.
        """
        self.start()
        return self._together(f"in {task.key}", [rank.chain.remote(task, shards, board) for rank in self.ranks])[0]

    def everywhere(self, when: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(rank, *arguments)`` on every rank, all at once; what rank 0 returned. ``when`` is for messages.

        Raises:
            WorkerLost, PatterningError, RuntimeError: as ``chain``.
        """
        self.start()
        return self._together(when, [rank.__ray_call__.remote(function, *arguments) for rank in self.ranks])[0]

    def start(self) -> None:
        """Start the ranks where they are not there (any more); raises as ``chain``."""
        if self.ranks:
            return
        need = sampling_resources(self.sampling, self.device, self.sampling.ranks_per_chain)
        if not self.placement.wait(self.placement_timeout):
            raise PatterningError(
                f"{self.name}: there was no room within {self.placement_timeout:g} s: {need.shortage(nodes())}; wait "
                "for other work to end, or lower sampling.ranks_per_chain"
            )
        for rank in range(need.num_ranks):
            place = PlacementGroupSchedulingStrategy(self.placement, placement_group_bundle_index=rank)
            environment = {"env_vars": RANK_ENVIRONMENT}
            actor = ChainRank.options(scheduling_strategy=place, runtime_env=environment, **need.options)
            self.ranks.append(actor.remote(Ranks(rank, need.num_ranks), self.sampling, self.device))
        (address,) = self._together("at the start", [self.ranks[0].open_store.remote()])
        calls = [rank.open_study.remote(self.make_study, *address) for rank in self.ranks]
        self.nodes = self._together("at the start", calls)

    def _together(self, when: str, calls: list[ray.ObjectRef]) -> list[Any]:
        """Results of one call a rank, in their order; the first failure is the end of the group."""
        waiting = list(calls)
        while waiting:
            done, waiting = ray.wait(waiting)
            if (error := _error(done[0])) is None:
                continue
            if waiting and not isinstance(error, ray.exceptions.RayActorError):  # it may be of a rank that another left
                done += ray.wait(waiting, num_returns=len(waiting), timeout=_GRACE)[0]
            self._fail(when, {calls.index(call): error for call in done if (error := _error(call))})
        return ray.get(calls)

    def _fail(self, when: str, errors: dict[int, Exception]) -> NoReturn:
        """Kill the group and say which rank was the cause: one that died, or else the first to raise."""
        for actor in self.ranks:
            ray.kill(actor)
        died = {rank: error for rank, error in errors.items() if isinstance(error, ray.exceptions.RayActorError)}
        rank, error = next(iter((died or errors).items()))
        node = f" on node {self.nodes[rank]}" if self.nodes else ""
        self.ranks, self.nodes = [], []
        if isinstance(error, PatterningError):
            raise PatterningError(str(getattr(error, "cause", error))) from None  # in Ray's wrapper
        if died:
            reason = loss_reason(error)
            raise WorkerLost(
                f"rank {rank} of {self.name}{node} died {when}, and the group with it ({reason})"
            ) from None
        raise RuntimeError(f"rank {rank} of {self.name}{node} failed {when}, and the group with it") from error


def chain_groups(
    make_study: MakeStudy, sampling: SamplingConfig, device: str, num_tasks: int, progress: Progress
) -> Workforce:
    """As many groups as the configuration or the cluster allows, at most one a task.

    Raises:
        PatterningError: the cluster cannot hold one group.
    """
    need = sampling_resources(sampling, device, sampling.ranks_per_chain)
    strategy, number = need.at_once(num_tasks, sampling.workers)
    if strategy == "PACK":
        progress.say(
            f"no node has {need}: the ranks of a chain are spread over nodes, and wait for the network between them"
        )
    groups: dict[ActorHandle, PlacementGroup] = {}
    numbers = itertools.count()

    def start_worker() -> tuple[ActorHandle, ray.ObjectRef]:
        placement = placement_group([need.bundle] * need.num_ranks, strategy=strategy)
        group = ChainGroup.remote(next(numbers), placement, make_study, sampling, device)
        groups[group] = placement
        return group, group.start.remote()

    def dismiss(group: ActorHandle) -> None:
        ray.kill(group)
        remove_placement_group(groups.pop(group))

    return Workforce(start_worker, number, need, progress, dismiss)


def chain_workers(
    make_study: MakeStudy, sampling: SamplingConfig, device: str, num_tasks: int, progress: Progress
) -> Workforce:
    """Who runs the chains: workers, or chain groups where a chain's model is shared by several ranks."""
    kind = model_workers if sampling.ranks_per_chain == 1 else chain_groups
    return kind(make_study, sampling, device, num_tasks, progress)


def _error(call: ray.ObjectRef) -> Exception | None:
    """What a call that is over raised."""
    try:
        ray.get(call)
    except Exception as error:
        return error
    return None
