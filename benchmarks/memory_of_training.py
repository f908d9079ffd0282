"""Does a rank of a retraining under ZeRO stage 3 hold 1/G of what a single process holds, at every stage?

Writes a GPT-NeoX model of 90 million random weights to a temporary folder, and retrains it from there with 1, 2 and 4
ranks (processes over gloo, one thread each): the model is loaded, AdamW takes steps, metrics and held-out losses are
measured, the weights are written, and a training checkpoint. Of each stage the peak of the resident memory above what
the process had before the model came, and of the whole the bytes of weights and optimizer state that live from step to
step.

    python benchmarks/memory_of_training.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist
import yaml
from memory_of_ranks import CONTEXT, SIZES, VOCABULARY, megabytes, status, write_model
from torch import Tensor

from patterning_dist.config import load_config
from patterning_dist.runtime.environment import RANK_ENVIRONMENT, prepare_process, worker_environment
from patterning_dist.runtime.training.engine import engine_state
from patterning_dist.runtime.training.trainer import Trainer
from patterning_dist.runtime.training.weights import save_weights
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.tasks.open import open_task
from patterning_dist.training.job import TrainingJob
from patterning_dist.training.state import encode

SETTINGS = {
    "name": "memory",
    "seed": 0,
    "device": "cpu",
    "training": {"batch_size": 4, "optimizer": "adamw", "learning_rate": 1e-4, "evaluation_sequences": 8},
    "sampling": {
        "components": [{"name": "everything"}],
        "observables": [{"kind": "split_loss", "name": "overall", "split": "overall"}],
        "num_chains": 2,
        "num_draws": 40,
        "burn_in": 1,
        "inverse_temperature": 30,
        "localization": 100,
        "step_size": 1e-7,
        "batch_size": 4,
        "micro_batch_size": 4,
        "probe_sequences": 4,
        "evaluation_sequences": 8,
    },
}
ZERO_3 = Path(__file__).parents[1] / "configs" / "deepspeed" / "zero3.json"


def write_experiment(folder: Path) -> int:
    """A model, tables of tokens, and the experiment on them; returns the number of weights."""
    number = write_model(folder / "model")
    rng = np.random.default_rng(0)
    for name in ("train", "held_out"):
        rows = rng.integers(0, VOCABULARY, size=(64, CONTEXT)).tolist()
        pq.write_table(pa.table({"input_ids": rows}), folder / f"{name}.parquet")
    data = {"kind": "tokens", "train": "train.parquet", "held_out": {"text": "held_out.parquet"}}
    data["context_length"] = CONTEXT
    sections = SETTINGS | {"data": data, "model": {"kind": "huggingface", "path": "model"}}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(sections))
    return number


class Peaks:
    """Peak resident memory of one stage after another, MB above what the process had at the start."""

    def __init__(self) -> None:
        self.before, self.found = status("VmRSS"), dict[str, float]()

    def __call__(self, stage: str, function: Callable[[], Any]) -> Any:
        """Run a stage."""
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
        result = function()
        self.found[stage] = status("VmHWM") - self.before
        return result


def run_rank(rank: int, size: int, folder: Path) -> dict[str, float]:
    """Memory of one rank, MB."""
    prepare_process(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / f'store-{size}'}", rank=rank, world_size=size)
    import deepspeed  # noqa: F401 - belongs to the time before the model
    import transformers.models.gpt_neox.modeling_gpt_neox  # noqa: F401

    config = load_config(folder / "experiment.yaml")
    task, ranks = open_task(config, folder, "cpu"), Ranks(rank, size)
    job = TrainingJob(
        name="memory",
        folder=folder / f"{size}",
        inputs=None,
        seed=0,
        num_steps=2,
        start="final",
        splits=(("overall", "overall"),),
        deepspeed=ZERO_3,
        num_workers=size,
    )
    stage = Peaks()
    trainer: Trainer = stage("loading", lambda: Trainer(config, task, job, ranks, "cpu"))
    stage("steps", lambda: [trainer.step(number) for number in range(job.num_steps)])
    stage("measuring", lambda: (trainer.evaluate(), trainer.observables()))
    path = job.folder / "model.safetensors"
    stage("writing", lambda: save_weights(trainer.engine, path if rank == 0 else None))
    stage("checkpoint", lambda: [len(encode(part)) for part in engine_state(trainer.engine)])
    states = [entry for state in trainer.optimizer.state.values() for entry in state.values()]
    kept = {
        "weights": [p.ds_tensor for p in trainer.engine.module.parameters()],
        "state": [*trainer.engine.optimizer.fp32_partitioned_groups_flat, *states],
    }
    tensors = {name: [t for t in found if isinstance(t, Tensor)] for name, found in kept.items()}
    return {name: megabytes(found) for name, found in tensors.items()} | stage.found


def measure(size: int, folder: Path) -> dict[str, float]:
    """The largest of all ranks, column by column."""
    processes = []
    for rank in range(size):
        environment = os.environ | worker_environment(1) | RANK_ENVIRONMENT
        environment |= {"RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_RANK": f"{rank}"}
        environment |= {"LOCAL_WORLD_SIZE": f"{size}", "LOCAL_SIZE": f"{size}", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, __file__, "--rank", f"{rank}", f"{size}", str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"a rank of {size} failed; see its message above")
    rows = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {name: max(row[name] for row in rows) for name in rows[0]}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Memory of a rank against the number of ranks of its training.")
    parser.add_argument("--rank", nargs=3, metavar=("RANK", "SIZE", "FOLDER"), help=argparse.SUPPRESS)
    if (own := parser.parse_args().rank) is not None:
        print(json.dumps(run_rank(int(own[0]), int(own[1]), Path(own[2]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        number = write_experiment(Path(folder))
        print(f"{number / 1e6:.0f} million weights, {4 * number / 1e6:.0f} MB; MB a rank, of the largest rank\n")
        rows: dict[int, dict[str, float]] = {}
        for size in SIZES:
            row = rows[size] = measure(size, Path(folder))
            if size == SIZES[0]:
                print(f"{'ranks':>6}" + "".join(f"{name:>16}" for name in row))
            cells = (f"{value:.0f} ({value / rows[1][name]:.2f})" for name, value in row.items())
            print(f"{size:>6}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
