"""What a worker needs, what every node of the Ray cluster has, and how many workers that makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import ray

from patterning_dist.config import Config, SamplingConfig
from patterning_dist.errors import PatterningError

_MAX_NAMED = 4  # nodes in a message


class Node(NamedTuple):
    """A node that is alive; ``total`` and ``free`` are amounts by resource (CPU, GPU)."""

    id: str
    name: str
    total: dict[str, float]
    free: dict[str, float]


class Fit(NamedTuple):
    """Ray's placement strategy for the ranks of a worker, and how many workers run at once."""

    strategy: str
    number: int


def nodes() -> list[Node]:
    """The nodes of the cluster that are alive."""
    free = ray._private.state.available_resources_per_node()
    return [
        Node(
            node["NodeID"],
            f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
            node["Resources"],
            free.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


@dataclass(frozen=True)
class Resources:
    """What one worker needs.

    Attributes:
        what: the worker, for messages.
        cpus, gpus: of one rank.
        num_ranks: processes that start and end together.
        keys: of the configuration, that lower what is needed.
    """

    what: str
    cpus: int
    gpus: int = 0
    num_ranks: int = 1
    keys: tuple[str, ...] = ()

    @property
    def bundle(self) -> dict[str, int]:
        """Amounts for one rank, by resource."""
        return {kind: amount for kind, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}

    @property
    def options(self) -> dict[str, Any]:
        """Ray options for the actor of one rank."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}

    def __str__(self) -> str:
        each = " and ".join(f"{amount} {kind}" for kind, amount in self.bundle.items())
        return f"{self.num_ranks} times {each}" if self.num_ranks > 1 else each

    def fit(self, cluster: list[Node]) -> Fit:
        """How ranks are placed, and how many workers fit: each on one node if some node has room, else over several."""
        ranks = [
            min(int(node.total.get(kind, 0) // amount) for kind, amount in self.bundle.items()) for node in cluster
        ]
        if on_one_node := sum(number // self.num_ranks for number in ranks):
            return Fit("STRICT_PACK", on_one_node)
        return Fit("PACK", sum(ranks) // self.num_ranks)

    def at_once(self, num_tasks: int, limit: int | None) -> Fit:
        """The same for the cluster as it is, with at most one worker a task and ``limit`` of them.

        Raises:
            PatterningError: not even one fits; names the nodes and the keys.
        """
        cluster = nodes()
        strategy, number = self.fit(cluster)
        if number < 1:
            raise PatterningError(self._refusal(cluster))
        return Fit(strategy, min(limit or number, number, num_tasks))

    def shortage(self, cluster: list[Node]) -> str:
        """What is needed and what is free, for whoever waits."""
        free = self._listed(
            cluster, lambda node, kind: f"{node.free.get(kind, 0):g} of {node.total.get(kind, 0):g} {kind}"
        )
        return f"{self.what} needs {self}; free are {free}"

    def _refusal(self, cluster: list[Node]) -> str:
        where = ", each on one node" if self.num_ranks > 1 else " on one node"
        there = self._listed(cluster, lambda node, kind: f"{node.total.get(kind, 0):g} {kind}")
        remedies = [f"lower {' or '.join(self.keys)}"] if self.keys else []
        remedies += ["set device: cpu"] if self.gpus else []
        remedy = f"{', '.join(remedies)} or add nodes" if remedies else "add nodes"
        return f"{self.what} needs {self}{where}; the Ray cluster has {there}; {remedy}"

    def _listed(self, cluster: list[Node], describe: Any) -> str:
        """The nodes that have most, with what ``describe`` says of each resource."""
        if not cluster:
            return "no node"
        ordered = sorted(cluster, key=lambda node: [-node.total.get(kind, 0) for kind in reversed(self.bundle)])
        named = [
            f"{' and '.join(describe(node, kind) for kind in self.bundle)} on {node.name}"
            for node in ordered[:_MAX_NAMED]
        ]
        more = len(cluster) - len(named)
        return ", ".join(named) + (f", no more than that on {more} others" if more else "")


def worker_resources(sampling: SamplingConfig, device: str) -> Resources:
    """One process with a study: a GPU on cuda, elsewhere ``sampling.threads_per_worker`` CPUs."""
    return _of_sampling("a worker", sampling, device, 1)


def chain_resources(sampling: SamplingConfig, device: str) -> Resources:
    """The ranks of one chain, each with what a worker has."""
    return _of_sampling("a chain", sampling, device, sampling.ranks_per_chain)


def _of_sampling(what: str, sampling: SamplingConfig, device: str, num_ranks: int) -> Resources:
    threads = sampling.threads_per_worker
    lowered = {"sampling.ranks_per_chain": num_ranks, "sampling.threads_per_worker": threads}
    if device == "cuda":
        return Resources(what, 0, 1, num_ranks, _above_one({"sampling.ranks_per_chain": num_ranks}))
    return Resources(what, threads, 0, num_ranks, _above_one(lowered))


def training_resources(config: Config, device: str, num_ranks: int) -> Resources:
    """The ranks of one training: ``training.threads_per_worker`` CPUs each, and a GPU on cuda."""
    threads = config.training.threads_per_worker
    keys = _above_one({"num_workers of training and retrain": num_ranks, "training.threads_per_worker": threads})
    return Resources("a training", threads, int(device == "cuda"), num_ranks, keys)


def _above_one(keys: dict[str, int]) -> tuple[str, ...]:
    return tuple(key for key, value in keys.items() if value > 1)
