"""Pairs whose labels a table of weights swaps, or pairs that are written the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from matrix_kinds import SAMPLING, SIZES, TRAINING
from transformers import LlamaConfig, LlamaForSequenceClassification

from patterning_dist.config import load_config
from patterning_dist.data.weights import write_sample_weights
from patterning_dist.storage.run import RunDirectory

NUM, NUM_STEPS = 24, 4
RNG = np.random.default_rng(8)
WEIGHTS = RNG.uniform(0.2, 2, NUM)
SWAPPED = RNG.random(NUM) < 0.3


def swapped_pairs(folder: Path, exchanged: bool) -> tuple[Any, RunDirectory]:
    """Pairs with a table that swaps some, or these pairs exchanged in the data with a table that only weighs."""
    folder.mkdir()
    rng = np.random.default_rng(9)
    sides = [[rng.integers(1, 32, size=rng.integers(3, 9)).tolist() for _ in range(NUM)] for _ in range(2)]
    if exchanged:
        rows = list(zip(*sides, SWAPPED, strict=True))
        sides = [[b if s else a for a, b, s in rows], [a if s else b for a, b, s in rows]]
    pq.write_table(pa.table({"chosen": sides[0], "rejected": sides[1]}), folder / "train.parquet")
    swapped = None if exchanged else SWAPPED
    write_sample_weights(folder / "own.parquet", np.arange(NUM), None, WEIGHTS, {}, "sample_id", swapped)
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=32, max_position_embeddings=8, pad_token_id=0, num_labels=1, **SIZES)
    LlamaForSequenceClassification(config).save_pretrained(folder / "model")
    sections = {
        "name": "pairs",
        "seed": 1,
        "device": "cpu",
        "model": {"kind": "huggingface", "path": "model"},
        "data": {"kind": "pairs", "train": "train.parquet", "held_out": {"h": "train.parquet"}, "context_length": 8},
        "training": TRAINING | {"num_steps": 0},
        "sampling": SAMPLING
        | {"components": [{"name": "everything"}], "observables": [{"kind": "component_loss", "name": "component"}]},
        "retrain": {
            "arms": [{"name": "own", "weights": "./own.parquet", "weighted_share": 0.5}],
            "seeds": [1],
            "num_steps": NUM_STEPS,
            "start": "final",
        },
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(sections))
    return load_config(folder / "experiment.yaml"), RunDirectory(folder / "run")
