"""Does a rank of a chain group hold 1/G of what a single process holds?

Writes a GPT-NeoX model of 90 million random weights to a temporary folder, and takes a step of a chain on all of its
weights with 1, 2 and 4 ranks (processes over gloo, one thread each). Counted are the bytes of the tensors that live
from step to step: weights, w*, gradient and the sampler's own state. The peak of the resident memory above what the
process had before the model came also has what comes and goes: layers put together, activations, temporaries.

    python benchmarks/memory_of_ranks.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from patterning_dist.models.components import select_component
from patterning_dist.models.passes import next_token_losses
from patterning_dist.runtime.environment import RANK_ENVIRONMENT, prepare_process, worker_environment
from patterning_dist.sampling.chain import Chain, ChainSettings
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samplers import Sampler
from patterning_dist.sampling.shard_loading import load_sharded_language_model
from patterning_dist.sampling.target import Target

SIZES = (1, 2, 4)
SAMPLERS = {"sgld": Sampler(), "rmsprop_sgld": Sampler("rmsprop_sgld", {"decay": 0.99, "stability": 0.1})}
VOCABULARY, CONTEXT = 12_288, 32


def write_model(folder: Path) -> int:
    """A model of random weights; returns their number."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=10,
        num_attention_heads=12,
        max_position_embeddings=CONTEXT,
    )
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def status(field: str) -> float:
    """A field of this process's memory, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1000


def run_rank(rank: int, size: int, sampler: str, folder: Path) -> dict[str, float]:
    """Memory of one rank, MB."""
    prepare_process(1)
    if size > 1:
        store = f"file://{folder / f'store-{sampler}-{size}'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    import transformers.models.gpt_neox.modeling_gpt_neox  # noqa: F401 - belongs to the time before the model

    before = status("VmRSS")
    ranks = Ranks(rank, size)
    model = load_sharded_language_model(str(folder), None, ranks, "cpu")
    component = select_component(model, "everything")
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, size=(64, CONTEXT)))
    target = Target(model, component, next_token_losses, tokens, tokens[:4], micro_batch_size=1, ranks=ranks)
    settings = ChainSettings(Posterior(30.0, 100.0), 1e-7, 4, 1, 1, 1, seed=0, sampler=SAMPLERS[sampler])
    chain = Chain(target, settings, 0, population=len(tokens))
    list(chain.draws())
    peak = status("VmHWM") - before
    _, gradient = target.gradient(np.arange(4))
    state = [piece for field in chain.state[1:] if isinstance(field, dict) for piece in field.values()]
    kept = {
        "weights": [p.to_local() if size > 1 else p for p in model.parameters()],
        "w*": list(target.center.values()),
        "gradient": list(gradient.values()),
        "state": state,
    }
    return {name: megabytes(tensors) for name, tensors in kept.items()} | {"peak": peak}


def megabytes(tensors: list[Tensor]) -> float:
    """Of the memory behind the tensors, what pads an uneven part included; memory that they share counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) / 1e6


def measure(size: int, sampler: str, folder: Path) -> dict[str, float]:
    """The largest of all ranks, column by column, and what is kept altogether."""
    environment = os.environ | worker_environment(1) | (RANK_ENVIRONMENT if size > 1 else {})
    processes = []
    for rank in range(size):
        command = [sys.executable, __file__, "--rank", f"{rank}", f"{size}", sampler, str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"a rank of {size} failed; see its message above")
    rows = [json.loads(output.splitlines()[-1]) for output in outputs]
    for row in rows:
        row["kept"] = sum(value for name, value in row.items() if name != "peak")
    return {name: max(row[name] for row in rows) for name in rows[0]}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Memory of a rank against the number of ranks of its chain.")
    parser.add_argument("--rank", nargs=4, metavar=("RANK", "SIZE", "SAMPLER", "FOLDER"), help=argparse.SUPPRESS)
    if (own := parser.parse_args().rank) is not None:
        print(json.dumps(run_rank(int(own[0]), int(own[1]), own[2], Path(own[3]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        number = write_model(Path(folder))
        print(f"{number / 1e6:.0f} million weights, {4 * number / 1e6:.0f} MB; MB a rank, of the largest rank\n")
        columns = ("weights", "w*", "gradient", "state", "kept", "peak")
        print(f"{'sampler':>13}{'ranks':>7}" + "".join(f"{name:>10}" for name in columns) + f"{'kept':>8}{'peak':>8}")
        for sampler in SAMPLERS:
            rows = {size: measure(size, sampler, Path(folder)) for size in SIZES}
            for size, row in rows.items():
                ratios = [row[name] / rows[1][name] for name in ("kept", "peak")]
                numbers = "".join(f"{row[name]:>10.0f}" for name in columns)
                print(f"{sampler:>13}{size:>7}{numbers}" + "".join(f"{ratio:>8.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
