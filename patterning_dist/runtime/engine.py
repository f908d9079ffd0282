"""DeepSpeed engines, with what the machine lacks switched off."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def deepspeed_config(path: Path | None, batch_size: int, num_ranks: int) -> dict[str, Any]:
    """The user's DeepSpeed JSON with the batch sizes that the run fixes.

    Args:
        path: DeepSpeed JSON; None: ZeRO stage 0.
        batch_size: global batch, sequences. Ranks and accumulation steps share it out.
        num_ranks: data-parallel ranks.
    """
    config = {"zero_optimization": {"stage": 0}} if path is None else json.loads(path.read_text())
    accumulation = config.get("gradient_accumulation_steps", 1)
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **config,
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // (num_ranks * accumulation),
        "gradient_accumulation_steps": accumulation,
    }


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], device: str) -> Any:
    """A DeepSpeed engine over the process group that Ray Train has set up.

    On the CPU the shared-memory communication operator is declared absent: it would be compiled for minutes at every
    first start, and a killed compilation leaves a lock that hangs the next.
    """
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]
    import deepspeed

    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logging.set_log_level_from_string("error")
    deepspeed.init_distributed(dist_backend="gloo" if device == "cpu" else "nccl", verbose=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


@contextlib.contextmanager
def whole_parameters(engine: Any) -> Iterator[nn.Module]:
    """The module with all its weights in place on every rank (ZeRO stage 3 keeps them in pieces otherwise)."""
    if engine.zero_optimization_stage() < 3:
        yield engine.module
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        yield engine.module


def copy_weights(module: nn.Module) -> dict[str, Tensor]:
    """Contiguous copies of all weights on the CPU, by name."""
    return {name: p.detach().to("cpu", torch.float32, copy=True).contiguous() for name, p in module.named_parameters()}
