"""What fits on a cluster is counted node by node, and what does not is refused with the nodes and the keys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_run import tiny_config

from patterning_dist.config import SamplingConfig
from patterning_dist.errors import PatterningError
from patterning_dist.runtime import resources
from patterning_dist.runtime.environment import usable_cores
from patterning_dist.runtime.resources import Node, Resources, refuse_too_large, sampling_resources


def cluster(*cpus: float, gpus: float = 0, free: float = 0) -> list[Node]:
    return [Node(str(i), f"host-{i}", {"CPU": has, "GPU": gpus}, {"CPU": free}) for i, has in enumerate(cpus)]


@pytest.mark.parametrize(
    ("cpus", "amount", "size", "placed"),
    [
        ([2.0], 1, 2, ("STRICT_PACK", 1)),
        ([8.0, 4.0, 3.0], 1, 4, ("STRICT_PACK", 3)),  # two groups on the first node, one on the second
        ([8.0, 8.0], 4, 2, ("STRICT_PACK", 2)),
        ([2.0, 2.0, 2.0], 1, 4, ("PACK", 1)),  # six ranks fit: one group, over two nodes
        ([3.0, 3.0], 2, 2, ("PACK", 1)),  # one rank of two CPUs a node
        ([3.0, 1.0], 2, 2, ("PACK", 0)),  # four CPUs, but in pieces
        ([1.0, 1.0], 2, 1, ("PACK", 0)),
        ([0.0], 1, 2, ("PACK", 0)),
        ([], 1, 2, ("PACK", 0)),
    ],
)
def test_ranks_are_kept_on_one_node_where_one_has_room(
    cpus: list[float], amount: int, size: int, placed: tuple[str, int]
) -> None:
    assert Resources("a chain", amount, num_ranks=size).fit(cluster(*cpus)) == placed


def test_the_scarcer_of_cpus_and_gpus_counts() -> None:
    training = Resources("a training", 4, 1)
    assert training.fit(cluster(16, gpus=2)).number == 2
    assert training.fit(cluster(6, gpus=2)).number == 1
    assert training.fit(cluster(16)).number == 0
    assert training.bundle == {"CPU": 4, "GPU": 1} and training.options == {"num_cpus": 4, "num_gpus": 1}


def test_a_chain_takes_gpus_where_there_are_some_and_else_threads() -> None:
    sampling = SamplingConfig.model_construct(threads_per_worker=3)
    assert str(sampling_resources(sampling, "cpu", 2)) == "2 times 3 CPU"
    assert str(sampling_resources(sampling, "cuda", 2)) == "2 times 1 GPU"
    assert sampling_resources(sampling, "cpu").bundle == {"CPU": 3}


def test_as_many_at_once_as_fit_are_allowed_and_have_something_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "nodes", lambda: cluster(4, 4))
    worker = Resources("a worker", 2)
    assert [worker.at_once(9, None), worker.at_once(9, 3), worker.at_once(2, 8)] == [
        ("STRICT_PACK", 4),
        ("STRICT_PACK", 3),
        ("STRICT_PACK", 2),
    ]


@pytest.mark.parametrize(
    ("need", "there", "text"),
    [
        (
            Resources("a training", 2, keys={"num_workers": 1, "training.threads_per_worker": 2}),
            cluster(1, 1),
            "a training needs 2 CPU on one node; the Ray cluster has 1 CPU on host-0, 1 CPU on host-1; lower "
            "training.threads_per_worker or add nodes",
        ),
        (
            Resources("a chain", 0, 1, 3, keys={"sampling.ranks_per_chain": 3}),
            cluster(1, gpus=2),
            "a chain needs 3 times 1 GPU, each on one node; the Ray cluster has 2 GPU on host-0; lower "
            "sampling.ranks_per_chain or set device: cpu or add nodes",
        ),
        (
            Resources("a worker", 8),
            cluster(0, 1, 2, 3, 4, 5, 6),
            "a worker needs 8 CPU on one node; the Ray cluster has 6 CPU on host-6, 5 CPU on host-5, 4 CPU on host-4, "
            "3 CPU on host-3, no more than that on 3 others; add nodes",
        ),
        (Resources("a worker", 1), [], "a worker needs 1 CPU on one node; the Ray cluster has no node; add nodes"),
    ],
)
def test_a_refusal_names_nodes_and_keys(
    monkeypatch: pytest.MonkeyPatch, need: Resources, there: list[Node], text: str
) -> None:
    monkeypatch.setattr(resources, "nodes", lambda: there)
    with pytest.raises(PatterningError) as caught:
        need.at_once(1, None)
    assert str(caught.value) == text


def test_what_a_later_stage_has_no_room_for_is_known_before_the_first(
    monkeypatch: pytest.MonkeyPatch, tiny_run: Path
) -> None:
    monkeypatch.setattr(resources, "nodes", lambda: cluster(2))
    config = tiny_config(tiny_run, "retrain.num_workers=4")
    with pytest.raises(PatterningError, match=r"a training needs 4 times 1 CPU.*lower num_workers of training"):
        refuse_too_large(config, "cpu", ["train", "sample", "retrain"])
    refuse_too_large(config, "cpu", ["train", "sample"])  # the others are done, or not asked for
    with pytest.raises(PatterningError, match=r"a worker needs 3 CPU on one node.*lower sampling\.threads_per_worker"):
        refuse_too_large(tiny_config(tiny_run, "sampling.threads_per_worker=3"), "cpu", ["sample"])


def test_who_waits_is_shown_what_is_free() -> None:
    need = Resources("a chain", 1, num_ranks=2)
    text = "a chain needs 2 times 1 CPU; free are 1 of 4 CPU on host-0, 1 of 2 CPU on host-1"
    assert need.shortage(cluster(4, 2, free=1)) == text


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        ({"cpu.max": "100000 100000"}, "0::/", 1),  # a container, which sees its own group at the root
        ({"cpu.max": "max 100000"}, "0::/", None),
        ({}, "0::/", None),
        ({"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 1),  # of the group around
        ({"cpu/job/cpu.cfs_quota_us": "100000", "cpu/job/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/job", 1),
        ({"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/job", None),
        ({"cpu.max": "50000 100000"}, "0::/", 1),  # half a CPU is one
    ],
)
def test_quotas_of_control_groups_count(tmp_path: Path, files: dict[str, str], own: str, expected: int | None) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    (tmp_path / "own").write_text(f"12:memory:/elsewhere\n{own}\n")
    affinity = len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path, tmp_path / "own") == min(affinity, expected or affinity)
