"""A study small enough for tests: two checkpoints of a tiny GPT-NeoX, and tokens in two domains."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from patterning_dist.config import Config, load_config

VOCABULARY, CONTEXT_LENGTH = 24, 8
SETTINGS = {
    "name": "tiny-study",
    "seed": 5,
    "device": "cpu",
    "model": {"kind": "huggingface", "path": "model", "checkpoints": ["early", "final"]},
    "data": {
        "kind": "tokens",
        "train": "train.parquet",
        "held_out": {"up": "up.parquet", "down": "down.parquet"},
        "context_length": CONTEXT_LENGTH,
    },
    "sampling": {
        "components": [{"name": "layer.0.head.1"}, {"name": "layer.1.mlp"}],
        "observables": [
            {"kind": "component_loss", "name": "component"},
            {"kind": "split_loss", "name": "up", "split": "domain:up"},
            {"kind": "split_loss", "name": "all", "split": "overall"},
            {"kind": "function", "names": ["norm"], "path": "study_models:norm"},
            {"kind": "llc", "name": "llc"},
            {"kind": "free_energy", "name": "free_energy"},
        ],
        "num_chains": 3,
        "num_draws": 16,
        "burn_in": 4,
        "steps_between_draws": 2,
        "inverse_temperature": 200,
        "localization": 20,
        "step_size": 2e-3,
        "batch_size": 6,
        "probe_sequences": 5,
        "evaluation_sequences": 7,
        "draws_per_push": 5,
        "num_batches": 4,
        "micro_batch_size": 4,
    },
}


def make_study(folder: Path) -> Path:
    """Write checkpoints, token tables and the experiment file; returns the file."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    rng = np.random.default_rng(1)
    steps = {"up": 1, "down": -1}

    def rows(domain: str, num: int) -> pa.Table:
        starts = rng.integers(VOCABULARY, size=(num, 1))
        tokens = (starts + steps[domain] * np.arange(CONTEXT_LENGTH)) % VOCABULARY
        return pa.table({"input_ids": list(tokens), "domain": [domain] * num})

    pq.write_table(pa.concat_tables([rows("up", 20), rows("down", 20)]), folder / "train.parquet")
    for domain in steps:
        pq.write_table(rows(domain, 9), folder / f"{domain}.parquet")
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    for seed, name in enumerate(("early", "final")):
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        model.save_pretrained(folder / "model" / name)
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    return file


def study_config(file: Path, *overrides: str) -> Config:
    """The configuration, with overrides as on the command line."""
    return load_config(file, overrides)


def norm(model: torch.nn.Module) -> torch.Tensor:
    """An observable: the squared norm of one layer's MLP."""
    return model.gpt_neox.layers[1].mlp.dense_h_to_4h.weight.square().sum()


def watched_norm(model: torch.nn.Module) -> torch.Tensor:
    """``norm``, a tenth of a second slower while there is a file "slow"; every call adds a byte to the file "calls"."""
    folder = Path(os.environ["TESTS_FOLDER"])
    with open(folder / "calls", "ab") as file:
        file.write(b".")
    time.sleep(0.1 * (folder / "slow").exists())
    return norm(model)


def undefined_on_one_side(model: torch.nn.Module) -> torch.Tensor:
    """An observable that is NaN in some of the chains: where one weight has gone up by 0.2."""
    weight = model.gpt_neox.layers[1].mlp.dense_4h_to_h.bias[0]
    return torch.where(weight > 0.17, torch.nan, weight)
