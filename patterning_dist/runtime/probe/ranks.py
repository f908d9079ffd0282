"""Groups of processes for as long as something is measured or tested in them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import ray

from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.groups import EngineRank
from patterning_dist.runtime.spares import SPARES
from patterning_dist.sampling.ranks import Ranks


@ray.remote
class ProbeRank(EngineRank):
    """One process of such a group. Functions run in it by ``__ray_call__``, and find its place in ``ranks``."""


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
    SPARES.dismiss()  # they take up room
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
