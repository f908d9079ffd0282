"""Processes that form a torch.distributed group, some of them for as long as something is measured or tested."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist

from patterning_dist.runtime.actor import Actor, ActorHandle
from patterning_dist.runtime.environment import prepare_process
from patterning_dist.sampling.ranks import Ranks


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

    def join(self, host: str, port: int) -> None:
        """Become a member of the group."""
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


@ray.remote
class ProbeRank(GroupRank):
    """One process of such a group. Functions run in it by ``__ray_call__``, and find its place in ``ranks``."""

    def __init__(self, ranks: Ranks, device: str, num_threads: int, timeout: float) -> None:
        prepare_process(num_threads)
        self.ranks, self.device, self.timeout = ranks, device, timedelta(seconds=timeout)
        # DeepSpeed looks for these; Ray shows every actor its own GPU only.
        layout = {"RANK": ranks.rank, "WORLD_SIZE": ranks.size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        os.environ.update({name: str(value) for name, value in layout.items()})

    def join(self, host: str, port: int) -> None:
        """As any rank, on the GPU that it sees, and where DeepSpeed looks for the others."""
        if self.device == "cuda":
            torch.cuda.set_device(0)
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
        GroupRank.join(self, host, port)


class ProbeGroup:
    """The ranks of one group, joined.

    Args:
        options: Ray options of every rank: resources, placement.
        device: of the ranks.
        num_threads: of a rank.
        timeout: seconds that anything may take.
    """

    def __init__(self, options: list[dict[str, Any]], device: str, num_threads: int, timeout: float) -> None:
        size, self.timeout = len(options), timeout
        self.ranks: list[ActorHandle] = [
            ProbeRank.options(**one).remote(Ranks(rank, size), device, num_threads, timeout)
            for rank, one in enumerate(options)
        ]

    def join(self) -> None:
        """Wait until every rank is there.

        Raises:
            ray.exceptions.GetTimeoutError: that took longer than the timeout.
        """
        host, port = ray.get(self.ranks[0].open_store.remote(), timeout=self.timeout)
        ray.get([rank.join.remote(host, port) for rank in self.ranks], timeout=self.timeout)

    def begin(self, function: Callable[..., Any], *arguments: Any) -> list[ray.ObjectRef]:
        """``function(rank, *arguments)`` on every rank at once."""
        return [rank.__ray_call__.remote(function, *arguments) for rank in self.ranks]


@contextlib.contextmanager
def probe_groups(
    options: list[list[dict[str, Any]]], device: str, num_threads: int, timeout: float
) -> Iterator[list[ProbeGroup]]:
    """Groups side by side, a list of Ray options a group; their processes are gone at the end."""
    groups: list[ProbeGroup] = []
    try:
        groups += [ProbeGroup(ranks, device, num_threads, timeout) for ranks in options]
        for group in groups:
            group.join()
        yield groups
    finally:
        for group in groups:
            for rank in group.ranks:
                ray.kill(rank)
