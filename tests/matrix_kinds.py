"""One tiny experiment of every kind of task that goes through the whole loop, for ``test_matrix``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from golden.runs import BRACKETS
from tiny_run import SETTINGS, write_corpus
from torch import nn
from torch.utils.data import TensorDataset

SAMPLING = {
    "num_chains": 2,
    "num_draws": 8,
    "burn_in": 2,
    "steps_between_draws": 1,
    "inverse_temperature": 50,
    "localization": 50,
    "step_size": 1e-3,
    "batch_size": 4,
    "probe_sequences": 6,
    "evaluation_sequences": 8,
    "num_batches": 4,
    "workers": 1,  # fewer processes to start; several are in `tests/ray`
}
# The scores of so few draws of an untrained model are noise, which stage solve refuses by default.
SOLVE = {"targets": {"wanted": -1}, "effective_sample_share": 0.8, "min_reliability": -1}
RETRAIN = {
    "arms": ["base", "plus", "permuted"],
    "seeds": [0],
    "num_steps": 3,
    "evaluate_every": 2,
    "concurrent_arms": 1,
}
ONLINE = {"name": "online", "weights": "plus", "rounds": 2}
IN_ROUNDS = RETRAIN | {"arms": [*RETRAIN["arms"], ONLINE], "start": "baseline"}
TRAINING = {"num_steps": 4, "batch_size": 4, "optimizer": "adamw", "evaluate_every": 3, "evaluation_sequences": 8}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def loop(name: str, component: str, split: str, **sections: Any) -> dict[str, Any]:
    """The loop with all its stages; a component of its own beside everything."""
    observables = [
        {"kind": "split_loss", "name": "wanted", "split": split},
        {"kind": "component_loss", "name": "component"},
        {"kind": "llc", "name": "llc"},
        {"kind": "free_energy", "name": "free_energy"},
    ]
    return {
        "name": name,
        "seed": 3,
        "device": "cpu",
        "training": TRAINING,
        "sampling": SAMPLING
        | {"components": [{"name": "everything"}, {"name": component}], "observables": observables},
        "calibration": {"num_draws": 8},
        "response": {"direction": {"component": "everything", "hessian_sequences": 4}},
        "solve": SOLVE | {"component": "everything"},
        "check": {"strengths": [-0.2, 0.2, 1]},
        "retrain": RETRAIN | {"start": "baseline"},
        **sections,
    }


def attention_only(folder: Path) -> dict[str, Any]:
    """Text, the attention-only transformer, muon."""
    data = SETTINGS["data"] | {"sources": [{"path": str(write_corpus(folder))}]}
    training = TRAINING | {"optimizer": "muon", "batch_size": 8}
    return loop(
        "attention-only",
        "layer.*.head.0",
        "induction_minus_rest",
        data=data,
        model=SETTINGS["model"],
        training=training,
        retrain=RETRAIN,  # from initialisation
    )


def gpt_neox(folder: Path) -> dict[str, Any]:
    """Text, a GPT-NeoX that is trained here, an arm in rounds."""
    data = SETTINGS["data"] | {"sources": [{"path": str(write_corpus(folder))}]}
    model = {"kind": "huggingface", "architecture": {"model_type": "gpt_neox", **SIZES}}
    return loop("gpt-neox", "layer.1.head.0", "domain:fables", data=data, model=model, retrain=IN_ROUNDS)


def llama(folder: Path) -> dict[str, Any]:
    """A Llama with grouped queries that exists already, tables of tokens with pads, the mass of every token kept."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=40, max_position_embeddings=16, num_key_value_heads=2, bos_token_id=None, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    rng = np.random.default_rng(1)
    for name, number in (("train", 30), ("held_out", 12)):
        rows = [rng.integers(1, 40, size=rng.integers(5, 13)).tolist() for _ in range(number)]
        pq.write_table(pa.table({"input_ids": rows}), folder / f"{name}.parquet")
    data = {"kind": "tokens", "train": "train.parquet", "held_out": {"other": "held_out.parquet"}, "context_length": 12}
    model = {"kind": "huggingface", "path": "model"}
    sections = {
        "retrain": RETRAIN | {"start": "final"},
        "solve": SOLVE | {"component": "everything", "keep_mass": "token"},
    }
    return loop("llama", "layer.0.kv.0", "domain:other", data=data, model=model, **sections)


def reward_model(folder: Path) -> dict[str, Any]:
    """A reward model on preference pairs, from initialisation."""
    rng = np.random.default_rng(2)
    for name, number in (("train", 30), ("held_out", 12)):
        columns = {
            side: [rng.integers(low, low + 20, size=rng.integers(4, 9)).tolist() for _ in range(number)]
            for side, low in (("chosen", 1), ("rejected", 12))
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    data = {"kind": "pairs", "train": "train.parquet", "held_out": {"hard": "held_out.parquet"}, "context_length": 8}
    architecture = {"model_type": "gpt_neox", "vocab_size": 32, "pad_token_id": 0, **SIZES}
    model = {"kind": "huggingface", "architecture": architecture}
    return loop("reward-model", "head", "domain:hard", data=data, model=model)


def digits(folder: Path) -> dict[str, Any]:
    """A module of the user's own, trained here."""
    functions = {name: f"matrix_kinds:{name}" for name in ("initialise", "per_sample_loss", "evaluate")}
    model = {"kind": "module", **functions}
    data = {"kind": "function", "load": "matrix_kinds:load"}
    return loop("digits", "0.weight", "domain:test", data=data, model=model)


def brackets(folder: Path) -> dict[str, Any]:
    """The parentheses experiment."""
    return BRACKETS | {"name": "brackets"}


KINDS = {kind.__name__: kind for kind in (attention_only, gpt_neox, llama, reward_model, digits, brackets)}


def initialise(seed: int) -> nn.Module:
    """Two layers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def per_sample_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def evaluate(model: nn.Module) -> dict[str, float]:
    """A metric of the user's own."""
    _, test = (split for split in load())
    inputs, labels = test["test"][torch.arange(len(test["test"]))]
    return {"accuracy": (model(inputs).argmax(dim=1) == labels).float().mean().item()}


def load() -> tuple[TensorDataset, dict[str, TensorDataset]]:
    """Points in three classes."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 4, generator=generator)
    labels = inputs[:, :3].argmax(dim=1)
    return TensorDataset(inputs[:40], labels[:40]), {"test": TensorDataset(inputs[40:], labels[40:])}
