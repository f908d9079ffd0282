"""Trainings of a small GPT-NeoX under several DeepSpeed settings on the ranks of a process group without Ray, and the
same by plain torch.

python zero_script.py RANK SIZE FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import yaml

from patterning_dist.config import load_config
from patterning_dist.config.deepspeed import BY_WIDTH
from patterning_dist.data.sampler import epoch_batch
from patterning_dist.data.weights import write_sample_weights
from patterning_dist.models import losses
from patterning_dist.models.huggingface import load_language_model
from patterning_dist.models.passes import next_token_losses
from patterning_dist.runtime.training.checkpoints import TrainingCheckpoints
from patterning_dist.runtime.training.trainer import Trainer
from patterning_dist.runtime.training.weights import load_shares, own_share, save_weights
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.shard import decoder_layers
from patterning_dist.sampling.shard_loading import load_sharded_language_model
from patterning_dist.stages.train import arm_jobs
from patterning_dist.storage.run import RunDirectory
from patterning_dist.tasks.open import open_task

VOCABULARY, CONTEXT, NUM_TRAIN, NUM_STEPS, BATCH = 29, 10, 40, 6, 8
BF16 = {"bf16": {"enabled": True}}
# Name -> (DeepSpeed JSON, keys of the section training).
ZERO = [{"zero_optimization": {"stage": stage}} for stage in range(4)]
AUTO = dict.fromkeys(BY_WIDTH, "auto")
CASES = {
    "zero 0": (ZERO[0], {}),
    "zero 2": (ZERO[2] | {"gradient_accumulation_steps": 2}, {}),
    "zero 3": (ZERO[3] | {"gradient_accumulation_steps": 2}, {}),
    "small buckets 3": ({"zero_optimization": {"stage": 3} | AUTO}, {}),
    "checkpointed 3": (ZERO[3], {"gradient_checkpointing": True}),
    "chunks 3": (ZERO[3], {}),
    "bf16 0": (ZERO[0] | BF16, {}),
    "bf16 2": (ZERO[2] | BF16, {}),
    "bf16 sums in float32": (ZERO[1] | BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}, {}),
    "bf16 chunks checkpointed 3": (
        ZERO[3] | BF16 | {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
    ),
}


def write_experiment(folder):
    """A model with random weights, tokens, weights of single tokens, and an arm trained on them."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, **sizes))
    model.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    for name in ("train", "held_out"):
        rows = rng.integers(0, VOCABULARY, size=(NUM_TRAIN, CONTEXT)).tolist()
        pq.write_table(pa.table({"input_ids": rows}), folder / f"{name}.parquet")
    sequence, position = (a.ravel() for a in np.meshgrid(range(NUM_TRAIN), range(1, CONTEXT), indexing="ij"))
    write_sample_weights(folder / "weights.parquet", sequence, position, rng.uniform(0, 3, len(sequence)), {})
    sections = {
        "name": "zero", "seed": 0, "device": "cpu",
        "model": {"kind": "huggingface", "path": "model"},
        "data": {
            "kind": "tokens", "train": "train.parquet", "held_out": {"text": "held_out.parquet"},
            "context_length": CONTEXT,
        },
        "training": {
            "batch_size": BATCH, "optimizer": "adamw", "learning_rate": 0.003, "weight_decay": 0.1, "warmup_steps": 2,
        },
        "sampling": {
            "components": [{"name": "everything"}], "observables": [{"kind": "split_loss", "name": "all", "split":
            "overall"}], "num_chains": 4, "num_draws": 40, "burn_in": 1, "inverse_temperature": 30, "localization": 100,
            "step_size": 1e-6, "batch_size": 4, "probe_sequences": 4, "evaluation_sequences": 16,
        },
        "retrain": {
            "arms": [{"name": "mine", "weights": "./weights.parquet"}], "seeds": [1], "num_steps": NUM_STEPS,
            "start": "final",
        },
    }  # fmt: skip
    (folder / "experiment.yaml").write_text(yaml.safe_dump(sections))


def by_hand(folder):
    """Losses of the steps and weights afterwards, of a loop in float32 without engine, ranks or task."""
    model = load_language_model(str(folder / "model"))
    tokens = torch.tensor(pq.read_table(folder / "train.parquet")["input_ids"].to_pylist())
    weights = torch.from_numpy(pq.read_table(folder / "weights.parquet")["weight"].to_numpy().copy()).float()
    weights = (weights / weights.mean()).view(NUM_TRAIN, CONTEXT - 1)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == two] for two in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    taken = []
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.003 * min(1, (step + 1) / 2)
        ids = torch.from_numpy(epoch_batch(1, step, BATCH, NUM_TRAIN))
        optimizer.zero_grad()
        loss = (weights[ids] * next_token_losses(model, tokens[ids])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        taken.append(loss.item())
    return taken, {name: p.detach() for name, p in model.named_parameters()}


RESUMED = ("zero 2", "zero 3", "bf16 2", "bf16 sums in float32", "bf16 chunks checkpointed 3")
MIDDLE = 3  # steps before a checkpoint


def open_case(folder, name, ranks):
    losses.CHUNK = 3 * VOCABULARY if "chunks" in name else 1 << 25
    settings, training = CASES[name]
    path = folder / f"{name}-{ranks.size}.json"
    if ranks.rank == 0:
        path.write_text(json.dumps(settings))
    dist.barrier()
    keys = [f"training.{key}={value}" for key, value in training.items()]
    keys += [f"retrain.deepspeed={path}", f"retrain.num_workers={ranks.size}"]
    config = load_config(folder / "experiment.yaml", keys)
    task = open_task(config, folder, "cpu")
    (job,) = arm_jobs(config, RunDirectory(folder / f"run-{ranks.size}-{ranks.rank}"))
    return Trainer(config, task, job, ranks, "cpu")


def checkpoints(folder, name, size, trainer):
    """Those that groups of a size wrote."""
    run, ignored = RunDirectory(folder / f"kept-{size}"), SimpleNamespace(remote=lambda *_, **__: None)
    job = dataclasses.replace(trainer.job, folder=run.path / name)
    control = SimpleNamespace(stopping=ignored, tell=ignored)
    return TrainingCheckpoints(job, "the same for all of a case", run.path, run.storage, control, "cpu")


def write(trainer, path):
    save_weights(trainer.engine, path if trainer.ranks.rank == 0 else None)


def sharded_gradients(folder, ranks):
    """Losses and gradients of a model that FSDP2 shards, with logits at once and by chunks; none of it by DeepSpeed."""
    tokens = torch.from_numpy(np.random.default_rng(ranks.rank).integers(0, VOCABULARY, size=(2, CONTEXT)))
    found = []
    for chunk in (1 << 25, 3 * VOCABULARY):
        losses.CHUNK = chunk
        model = load_sharded_language_model(str(folder / "model"), None, ranks, "cpu")
        values = next_token_losses(model, tokens)
        values.square().sum().backward()
        found.append(
            [values.detach(), *((p.grad.full_tensor() if ranks.size > 1 else p.grad) for p in model.parameters())]
        )
    for by_chunks, at_once in zip(*found, strict=True):
        torch.testing.assert_close(by_chunks, at_once, rtol=1e-5, atol=1e-6 * at_once.abs().max().item())


def train_all(folder, ranks):
    """Every case on the ranks of this process group; rank 0 writes losses, metrics and weights."""
    for name in CASES:
        trainer, result, taken = open_case(folder, name, ranks), folder / f"{name}-{ranks.size}", []
        write(trainer, result / "initial.safetensors")
        for step in range(NUM_STEPS):
            if step == MIDDLE and name in RESUMED:
                write(trainer, result / "middle.safetensors")
                recorders = [{}], [{"average": own_share(trainer.engine)}]
                checkpoints(folder, name, ranks.size, trainer)._save(trainer.engine, step, recorders)
            taken += trainer.step(step)
        found = {"losses": taken, "metrics": trainer.evaluate(), "observables": trainer.observables()[0]}
        write(trainer, result / "model.safetensors")
        found["checkpointed"] = [isinstance(f.forward, partial) for f in decoder_layers(trainer.engine.module)]
        if ranks.rank == 0:
            (result / "found.json").write_text(json.dumps(found))
        trainer.engine.destroy()


def resume_all(folder, ranks):
    """From the checkpoints of each of the groups."""
    for size in (1, 2):
        deadline = time.monotonic() + 500
        while not (folder / f"{list(CASES)[-1]}-{size}" / "found.json").exists():
            assert time.monotonic() < deadline, f"the group of {size} has not come to its end"
            time.sleep(0.1)
        for name in RESUMED:
            trainer, result = open_case(folder, name, ranks), folder / f"{name}-{ranks.size}-from-{size}"
            kept = checkpoints(folder, name, size, trainer).restore(trainer.engine)
            assert kept["step"] == MIDDLE
            (_, own), *none = kept["recorders"]
            assert not none
            for step in range(MIDDLE, NUM_STEPS):
                trainer.step(step)
            write(trainer, result / "model.safetensors")
            load_shares(trainer.engine, own["average"])
            write(trainer, result / "average.safetensors")
            trainer.engine.destroy()


def run_groups(folder, sizes):
    """Groups of so many ranks, at once; waits for them."""
    processes = {}
    for size in sizes:
        for rank in range(size):
            environment = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
            environment |= {"LOCAL_SIZE": size, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1}
            command = [sys.executable, __file__, f"{rank}", f"{size}", str(folder)]
            log = folder / f"{size}-{rank}.log"
            with log.open("w") as file:
                named = {name: str(value) for name, value in environment.items()}
                processes[log] = subprocess.Popen(command, env=os.environ | named, stdout=file, stderr=file)
    deadline = time.monotonic() + 600
    try:
        for log, process in processes.items():
            assert process.wait(max(1, deadline - time.monotonic())) == 0, log.read_text()[-3000:]
    finally:
        for process in processes.values():
            process.kill()


if __name__ == "__main__":
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / f'store-{size}'}", rank=rank, world_size=size)
    sharded_gradients(folder, Ranks(rank, size))
    train_all(folder, Ranks(rank, size))
    resume_all(folder, Ranks(rank, size))
