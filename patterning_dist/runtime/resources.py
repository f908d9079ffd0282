"""What a worker needs, what every node of the Ray cluster has, and how many workers that makes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

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
        keys: of the configuration, with their values: those above 1 can be lowered.
    """

    what: str
    cpus: int
    gpus: int = 0
    num_ranks: int = 1
    keys: dict[str, int] = field(default_factory=dict, compare=False)

    @property
    def bundle(self) -> dict[str, int]:
        """Amounts for one rank, by resource."""
        return {kind: amount for kind, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}

    @property
    def options(self) -> dict[str, int]:
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

    def at_once(self, num_tasks: int, limit: int | None, cluster: list[Node] | None = None) -> Fit:
        """The same for a cluster, None: as it is now, with at most one worker a task and ``limit`` of them.

        Raises:
            PatterningError: not even one fits; names the nodes and the keys.
        """
        cluster = nodes() if cluster is None else cluster
        strategy, number = self.fit(cluster)
        if number < 1:
            raise PatterningError(self._refusal(cluster))
        return Fit(strategy, min(limit or number, number, num_tasks))

    def shortage(self, cluster: list[Node]) -> str:
        """What is needed and what is free, for whoever waits."""
        free = self._listed(cluster, lambda node, kind: f"{node.free.get(kind, 0):g} of {node.total.get(kind, 0):g}")
        return f"{self.what} needs {self}; free are {free}"

    def _refusal(self, cluster: list[Node]) -> str:
        where = ", each on one node" if self.num_ranks > 1 else " on one node"
        there = self._listed(cluster, lambda node, kind: f"{node.total.get(kind, 0):g}")
        remedies = [f"lower {key}" for key, value in self.keys.items() if value > 1]
        remedies += ["set device: cpu"] * bool(self.gpus) + ["add nodes"]
        return f"{self.what} needs {self}{where}; the Ray cluster has {there}; {' or '.join(remedies)}"

    def _listed(self, cluster: list[Node], amount: Callable[[Node, str], str]) -> str:
        """The nodes that have most of the last resource of a bundle: of GPUs, if they are needed."""
        ordered = sorted(cluster, key=lambda node: -node.total.get([*self.bundle][-1], 0))
        named = [
            f"{' and '.join(f'{amount(node, kind)} {kind}' for kind in self.bundle)} on {node.name}"
            for node in ordered[:_MAX_NAMED]
        ]
        named += [f"no more than that on {len(cluster) - len(named)} others"] * (len(cluster) > len(named))
        return ", ".join(named) or "no node"


def sampling_resources(sampling: SamplingConfig, device: str, num_ranks: int = 1) -> Resources:
    """One process with a study, or the ranks of a chain: a GPU each on cuda, elsewhere threads_per_worker CPUs."""
    what, keys = "a worker" if num_ranks == 1 else "a chain", {"sampling.ranks_per_chain": num_ranks}
    if device == "cuda":
        return Resources(what, 0, 1, num_ranks, keys)
    threads = sampling.threads_per_worker
    return Resources(what, threads, 0, num_ranks, keys | {"sampling.threads_per_worker": threads})


def training_resources(config: Config, device: str, num_ranks: int) -> Resources:
    """The ranks of one training: ``training.threads_per_worker`` CPUs each, and a GPU on cuda."""
    assert config.training is not None
    threads = config.training.threads_per_worker
    keys = {"num_workers of training or retrain": num_ranks, "training.threads_per_worker": threads}
    return Resources("a training", threads, int(device == "cuda"), num_ranks, keys)


def refuse_too_large(config: Config, device: str, stages: Collection[str]) -> None:
    """Look whether the cluster has room for one worker of every stage, before the first begins.

    Raises:
        PatterningError: as ``Resources.at_once``.
    """
    needs = {"sample": sampling_resources(config.sampling, device, config.sampling.ranks_per_chain)}
    for stage, section in (("train", config.training), ("retrain", config.retrain)):
        if section is not None:
            needs[stage] = training_resources(config, device, section.num_workers)
    for stage, need in needs.items():
        if stage in stages:
            need.at_once(1, None)
