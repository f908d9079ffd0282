"""Bytes that DeepSpeed engines hold between backward pass and step, one after another: JSON of [stage, is narrow,
parameters, bytes held, bytes planned]."""

from __future__ import annotations

import gc
import json
import tempfile
from pathlib import Path

import torch
from torch import nn

from patterning_dist.config.deepspeed import deepspeed_config
from patterning_dist.runtime.training.engine import initialize_alone
from patterning_dist.sampling.footprint import Footprint
from patterning_dist.stages.plan.memory import training_memory

CASES = [(stage, narrow) for stage in range(4) for narrow in (False, True)]
ZERO = {"reduce_bucket_size": 10_000, "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 10_000}
WIDTH = 300


def held() -> dict[int, int]:
    """Address of all memory behind tensors -> bytes."""
    gc.collect()
    found = (entry for entry in gc.get_objects() if isinstance(entry, torch.Tensor) and entry.device.type == "cpu")
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}


def measure(stage: int, narrow: bool, folder: Path) -> list[float]:
    """One engine."""
    zero = {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0} | ZERO
    file = folder / f"{stage}-{narrow}.json"
    file.write_text(json.dumps({"zero_optimization": zero} | ({"bf16": {"enabled": True}} if narrow else {})))
    before = held()
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    number, settings = sum(p.numel() for p in model.parameters()), deepspeed_config(file, 2, 1)
    engine = initialize_alone(model, torch.optim.AdamW(model.parameters()), settings, "cpu")
    inputs = torch.randn(2, WIDTH, dtype=torch.bfloat16 if narrow else torch.float32)
    now: dict[int, int] = {}
    for _ in range(2):  # moments are there after the first step
        engine.backward(engine(inputs).float().square().mean())
        now = held()
        engine.step()
    real = sum(num_bytes for address, num_bytes in now.items() if address not in before)
    planned = training_memory(number, settings, 1, True, Footprint(0, 0.0, 0))
    return [stage, narrow, number, real, sum(planned.values())]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps([measure(*case, Path(folder)) for case in CASES]))
