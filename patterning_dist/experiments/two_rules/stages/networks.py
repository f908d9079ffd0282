"""Networks of the run: their seeds, their files, and what they do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file

from patterning_dist.experiments.two_rules.behaviour import behaviour
from patterning_dist.experiments.two_rules.config import ParenthesesConfig
from patterning_dist.experiments.two_rules.task import BracketTask
from patterning_dist.progress import Progress
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.runtime.training.stack_worker import StackRecipe, StackTask, Trained
from patterning_dist.runtime.training.stacks import train_stacks
from patterning_dist.storage.files import atomic_path, file_sha256, write_parquet
from patterning_dist.storage.run import RunDirectory, stage_fingerprint
from patterning_dist.training.stacked import Phase, StackSettings

# First seeds of networks that are chosen from, of those of the arms, and of those of online rounds: never the same.
POOL, ARMS, ROUNDS = 0, 1_000_000, 2_000_000


def network_seeds(config: ParenthesesConfig, first: int, number: int) -> list[int]:
    """Seeds of initial weights and minibatches; runs of different seeds share none."""
    start = (config.seed * 10_000_000 + first) % 2**63
    return list(range(start, start + number))


def train_networks(
    config: ParenthesesConfig,
    run: RunDirectory,
    arms: dict[str, tuple[Sequence[int], Sequence[Phase]]],
    folder: str,
    progress: Progress,
) -> dict[str, Trained]:
    """Train networks, as many at once as training.seeds_per_task says; arm -> its networks, in the order of the seeds.

    Args:
        config: of the run.
        run: its directory; data/ is read, stacks are kept under <folder>/stacks.
        arms: name -> (seeds, phases).
        folder: name, under the run directory.
        progress: shows the steps.
    """
    size = config.training.seeds_per_task
    tasks = [
        StackTask(arm, tuple(seeds[start : start + size]), tuple(phases))
        for arm, (seeds, phases) in arms.items()
        for start in range(0, len(seeds), size)
    ]
    device = resolve_device(config.device)
    inputs = stage_fingerprint(
        "networks",
        {
            "model": config.model.model_dump(mode="json"),
            "training": config.training.model_dump(mode="json"),
            "strings": file_sha256(run.path / "data" / "train.parquet"),
            "device": device,
        },
    )
    settings = StackSettings(**config.training.model_dump(include={*StackSettings._fields}))
    recipe = StackRecipe(partial(BracketTask, config), ("data",), behaviour, settings, config.training.engine)
    done = train_stacks(recipe, config.sampling, device, run, inputs, tasks, f"{folder}/stacks", progress)
    return {
        arm: _joined([trained for task, trained in zip(tasks, done, strict=True) if task.arm == arm]) for arm in arms
    }


def write_networks(folder: Path, seeds: Sequence[int], trained: Trained) -> list[Path]:
    """Write networks.safetensors (stacked) and networks.parquet (behaviour); returns both."""
    weights, table = folder / "networks.safetensors", folder / "networks.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(weights) as temporary:
        save_file({name: torch.from_numpy(values) for name, values in trained.parameters.items()}, temporary)
    columns = {"seed": np.array(seeds, np.int64)} | trained.behaviour
    write_parquet(table, pa.table(columns), {"units": "shares of strings", "rejected": "1 NESTED, 0 EQUAL-COUNT"})
    return [weights, table]


def _joined(parts: list[Trained]) -> Trained:
    arrays = [part.arrays() for part in parts]
    return Trained.of({name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]})
