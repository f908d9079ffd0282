"""GPUs that an experiment is planned for without having them, and how long work takes there."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from patterning_dist.models.huggingface import Head, from_config, quiet
from patterning_dist.models.passes import logits_in_float32
from patterning_dist.response.cost import Seconds
from patterning_dist.runtime.resources import Node
from patterning_dist.sampling.footprint import Footprint, Weightless
from patterning_dist.sampling.samples import to_device
from patterning_dist.tasks.task import Task

# What is assumed of any GPU, its node and its files; ``Machine.assumptions`` prints it.
LAUNCH = 10e-6  # of a kernel [s]
MEMORY_BANDWIDTH, DISK_BANDWIDTH = 1e12, 1e9  # [B/s]
LINK, NETWORK = 50e9, 5e9  # of a GPU to those of its node, and of others [B/s]
STARTING = 60.0  # of processes [s]
LONGER = 1.5  # than all of this, at most
RESERVE, RESERVED_SHARE = 1.5e9, 0.08  # of a GPU: context and libraries [B], and what the allocator cannot use
_MEASURED_LAYERS = 2


@dataclass(frozen=True)
class Machine:
    """Nodes of GPUs.

    Attributes:
        num_nodes: of them, all alike.
        gpus_per_node: of each.
        gpu_bytes: memory of a GPU.
        flops: that a GPU reaches in passes of this model [1/s]; None: not known.
        measured: whether ``flops`` was measured here.
        assumed: what else is, in words.
    """

    num_nodes: int
    gpus_per_node: int
    gpu_bytes: float
    flops: float | None
    measured: bool = False
    assumed: tuple[str, ...] = ()

    @property
    def num_gpus(self) -> int:
        """Of all nodes."""
        return self.num_nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> float:
        """Of a GPU, less the reserve."""
        return self.gpu_bytes * (1 - RESERVED_SHARE) - RESERVE

    @property
    def nodes(self) -> list[Node]:
        """As Ray would name them; CPUs are not counted."""
        has = {"GPU": float(self.gpus_per_node), "CPU": float("inf")}
        return [Node(str(number), f"node {number}", has, has) for number in range(self.num_nodes)]

    def passes(self, cost: Footprint, times: float = 1.0) -> float:
        """Seconds of passes: FLOPs at the rate, and the start of every kernel, which is in a rate that was measured."""
        assert self.flops is not None
        starts = 0.0 if self.measured else cost.num_operations * LAUNCH
        return times * (cost.flops / self.flops + starts)

    def exchange(self, num_bytes: float, num_ranks: int) -> float:
        """Seconds until every rank has what the others have of so many bytes, nothing done meanwhile."""
        link = LINK if num_ranks <= self.gpus_per_node else NETWORK
        return num_bytes * (num_ranks - 1) / num_ranks / link

    @property
    def assumptions(self) -> list[str]:
        """What times and memory are taken to follow from, in words."""
        source = "measured here" if self.measured else "given"
        rate = "" if self.flops is None else f"{self.flops:.3g} FLOP/s a GPU, {source}; "
        return [
            *self.assumed,
            f"a GPU of {self.gpu_bytes / 1e9:g} GB has {self.usable_bytes / 1e9:.1f} GB for a rank: "
            f"{RESERVE / 1e9:g} GB for context and libraries and {RESERVED_SHARE:.0%} for what the allocator cannot "
            "use are kept back",
            f"{rate}{LAUNCH * 1e6:g} us to start a kernel; {MEMORY_BANDWIDTH / 1e12:g} TB/s of GPU memory, "
            f"{LINK / 1e9:g} GB/s between GPUs of a node, {NETWORK / 1e9:g} GB/s between nodes, "
            f"{DISK_BANDWIDTH / 1e9:g} GB/s from files; {STARTING:g} s until processes are up; nothing overlaps, and "
            f"up to {LONGER:g} times as long",
        ]


def seconds(value: float) -> Seconds:
    """From arithmetic: not less, and up to ``LONGER`` times as long."""
    return Seconds(value, value, LONGER * value)


def measure_flops(task: Task, num_samples: int, device: str, seed: int = 0) -> float:
    """FLOP/s of forward and backward passes on a device: counted, over the shortest of some times.

    Models of ``transformers`` have two of their layers there, so that any fits, with fresh weights and all embeddings.

    Args:
        task: of the model.
        num_samples: of a pass.
        device: torch device.
        seed: of the weights.
    """
    skeleton: Any = task.skeleton()
    moving = {name for name, p in skeleton.named_parameters() if p.is_floating_point()}
    batch = task.train[torch.from_numpy(np.arange(num_samples) % len(task.train))]
    config = getattr(skeleton, "config", None)
    if config is None:
        model = task.build(seed)
    else:
        config = copy.deepcopy(config)
        text = config.get_text_config()
        text.num_hidden_layers = min(text.num_hidden_layers, _MEASURED_LAYERS)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
        head: Head = "tokens" if skeleton.get_output_embeddings() is not None else "classes"
        with quiet(), torch.device("meta"):
            skeleton = from_config(config, head)
        with quiet(), torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            model = from_config(config, head)
        logits_in_float32(model)
        logits_in_float32(skeleton)
    counted = Weightless(skeleton, task.losses, task.compute_dtype).gradient(batch, moving)
    model, there = model.to(device).eval(), to_device(batch, device)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        with torch.autocast(device, task.compute_dtype, enabled=task.compute_dtype not in (None, torch.float32)):
            losses = task.losses(model, there).float()
        losses.sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return counted.flops / best
