"""Groups of Ray actors that form a torch.distributed group: ranks of one chain, or of one training.

The ranks of a group talk through torch.distributed among themselves, and through messages with everybody else. A group
is one failure domain: a process group cannot take a lost rank back, so when one dies all are killed.
"""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import psutil
import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.runtime.actor import Actor, ActorHandle
from patterning_dist.runtime.environment import prepare_process
from patterning_dist.runtime.resources import Resources, nodes
from patterning_dist.runtime.spares import SPARES
from patterning_dist.runtime.workforce import TaskFailed, WorkerLost, Workforce, loss_of
from patterning_dist.sampling.ranks import Ranks

PLACEMENT_TIMEOUT = 300.0  # seconds until the resources of a group must have become free
_NO_TIME = 0.01  # seconds
_GRACE = 5.0  # seconds after the first failure, in which the rank that caused it may be found out


class GroupRank(Actor):
    """A process that is one rank of a torch.distributed group of actors."""

    ranks: Ranks
    device: str
    timeout: timedelta

    def open_store(self) -> tuple[str, int]:
        """Host and port where rank 0 lets the others find each other."""
        host = ray.util.get_node_ip_address()
        self.store = dist.TCPStore(
            host, 0, self.ranks.size, is_master=True, wait_for_workers=False, timeout=self.timeout
        )
        return host, self.store.port

    def join(self, host: str, port: int) -> str:
        """Become a member of the group; returns the address of the node."""
        address = ray.util.get_node_ip_address()
        # By default gloo listens where this host's own name leads to, which on many is loopback.
        if (interface := interface_of(address)) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if self.ranks.rank > 0:
            self.store = dist.TCPStore(host, port, self.ranks.size, is_master=False, timeout=self.timeout)
        dist.init_process_group(
            # Sums of single numbers stay on the CPU.
            "gloo" if self.device == "cpu" else "cpu:gloo,cuda:nccl",
            store=self.store,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            timeout=self.timeout,
        )
        return address


def interface_of(address: str) -> str | None:
    """The network interface that has an address; None: none of this host's."""
    found = (name for name, own in psutil.net_if_addrs().items() if address in [each.address for each in own])
    return next(found, None)


class EngineRank(GroupRank):
    """One in which DeepSpeed finds its way."""

    def __init__(self, ranks: Ranks, device: str, num_threads: int, timeout: float) -> None:
        prepare_process(num_threads)
        self.ranks, self.device, self.timeout = ranks, device, timedelta(seconds=timeout)
        # DeepSpeed looks for these; Ray shows every actor its own GPU only.
        layout = {"RANK": ranks.rank, "WORLD_SIZE": ranks.size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        os.environ.update({name: str(value) for name, value in layout.items()})

    def be_alone(self) -> None:
        """Be a group of one, if this process is not one yet."""
        if not dist.is_initialized():
            self.join(*self.open_store())

    def join(self, host: str, port: int) -> str:
        """As any rank, on the GPU that it sees, and where DeepSpeed looks for the others."""
        if self.device == "cuda":
            torch.cuda.set_device(0)
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
        return super().join(host, port)


class RankGroup(Actor, ABC):
    """Starts the ranks of a group, and watches all of them; used like a worker of one process.

    After a failure the next call restarts them. The ranks go when this actor goes.

    Args:
        name: of the group, for messages.
        placement: a bundle for every rank. It is not made here: Ray would keep it after this actor's death.
        need: of the ranks.
        placement_timeout: seconds until the placement group must be there.
    """

    def __init__(self, name: str, placement: PlacementGroup, need: Resources, placement_timeout: float) -> None:
        self.name, self.placement, self.need, self.placement_timeout = name, placement, need, placement_timeout
        self.ranks: list[ActorHandle] = []
        self.nodes: list[str] = []

    @abstractmethod
    def make_rank(self, ranks: Ranks, options: dict[str, Any]) -> ActorHandle:
        """The actor of one rank, with these options of Ray."""

    def open_rank(self, rank: ActorHandle, host: str, port: int) -> ray.ObjectRef:
        """Let a rank join, and do what is to be done before the first call; the address of its node."""
        return rank.join.remote(host, port)

    def everywhere(self, when: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(rank, *arguments)`` on every rank, all at once; what rank 0 returned. ``when`` is for messages.

        Raises:
            WorkerLost: a rank died; the next call restarts the group.
            PatterningError: the ranks found no room in time, or one refused what the user can put right.
            RuntimeError: a rank raised something else.
        """
        self.start()
        return self._together(when, [rank.__ray_call__.remote(function, *arguments) for rank in self.ranks])[0]

    def start(self) -> None:
        """Start the ranks where they are not there (any more); raises as ``everywhere``."""
        if self.ranks:
            return
        if not self.placement.wait(self.placement_timeout):
            raise PatterningError(
                f"{self.name}: there was no room within {self.placement_timeout:g} s: {self.need.shortage(nodes())}; "
                f"wait for other work to end, or lower {next(iter(self.need.keys))}"
            )
        for rank in range(self.need.num_ranks):
            place = PlacementGroupSchedulingStrategy(self.placement, placement_group_bundle_index=rank)
            options = {"scheduling_strategy": place, **self.need.options}
            self.ranks.append(self.make_rank(Ranks(rank, self.need.num_ranks), options))
        (address,) = self._together("at the start", [self.ranks[0].open_store.remote()])
        self.nodes = self._together("at the start", [self.open_rank(rank, *address) for rank in self.ranks])

    def _together(self, when: str, calls: list[ray.ObjectRef]) -> list[Any]:
        """Results of one call a rank, in their order; the first failure is the end of the group."""
        waiting = list(calls)
        while waiting:
            # For as long as it takes: the driver kills a group that makes no progress.
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
        if died or isinstance(error, WorkerLost):
            (reason, fault), what = loss_of(error), "died" if died else "failed"
            text = f"rank {rank} of {self.name}{node} {what} {when}, and the group with it ({reason})"
            raise (WorkerLost(text) if fault is None else TaskFailed(fault, text)) from None
        raise RuntimeError(f"rank {rank} of {self.name}{node} failed {when}, and the group with it") from error


def rank_groups(
    make_group: Callable[[int, PlacementGroup], ActorHandle],
    need: Resources,
    num_tasks: int,
    limit: int | None,
    progress: Progress,
) -> Workforce:
    """As many groups as the limit or the cluster allows, at most one a task.

    Args:
        make_group: (number of the group, a bundle for every rank) -> its ``RankGroup`` actor.
        need: of a group.
        num_tasks: that there are.
        limit: of groups; None: what the cluster holds.
        progress: hears what is waited for.

    Raises:
        PatterningError: the cluster cannot hold one group.
    """
    SPARES.dismiss()  # they take up room
    strategy, number = need.at_once(num_tasks, limit)
    if strategy == "PACK":
        progress.say(
            f"no node has {need}: the ranks of {need.what} are spread over nodes, and wait for the network between them"
        )
    groups: dict[ActorHandle, PlacementGroup] = {}
    numbers = itertools.count()

    def start_worker() -> tuple[ActorHandle, ray.ObjectRef]:
        placement = placement_group([need.bundle] * need.num_ranks, strategy=strategy)
        group = make_group(next(numbers), placement)
        groups[group] = placement
        return group, group.start.remote()

    def dismiss(group: ActorHandle) -> None:
        ray.kill(group)
        remove_placement_group(groups.pop(group))

    return Workforce(start_worker, number, need, progress, dismiss, has_room=lambda group: groups[group].wait(_NO_TIME))


def _error(call: ray.ObjectRef) -> Exception | None:
    """What a call that is over raised."""
    try:
        ray.get(call)
    except Exception as error:
        return error
    return None
