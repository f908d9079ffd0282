"""Folders of the shapes of `configs/pythia-160m.yaml` and `configs/llama-1b-reward.yaml`: config.json, tokenizer and
short tables, no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PYTHIA_160M = {
    "vocab_size": 50304,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
    "architectures": ["GPTNeoXForCausalLM"],
}
LLAMA_1B_REWARD = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 128004,
    "tie_word_embeddings": True,
    "num_labels": 1,
    "architectures": ["LlamaForSequenceClassification"],
}


def write_pythia_160m(folder: Path) -> list[str]:
    """Its folder and tables; returns overrides that make the experiment use them."""
    from transformers import GPTNeoXConfig

    GPTNeoXConfig(**PYTHIA_160M).save_pretrained(folder / "model")
    _write_tokenizer(folder / "model")
    tables = {name: {"input_ids": _rows(number, 512)} for name, number in (("train", 80), ("prose", 9), ("code", 9))}
    return _overrides(folder, tables)


def write_llama_1b_reward(folder: Path) -> list[str]:
    """Its folder and tables; returns overrides that make the experiment use them."""
    from transformers import LlamaConfig

    LlamaConfig(**LLAMA_1B_REWARD).save_pretrained(folder / "model")
    _write_tokenizer(folder / "model")
    columns = ("prompt", "chosen", "rejected")
    sizes = (("train", 300), ("helpful", 9), ("harmless", 9))
    return _overrides(folder, {name: {column: _rows(number, 40) for column in columns} for name, number in sizes})


def _rows(number: int, length: int) -> list[np.ndarray]:
    return list(np.random.default_rng(number).integers(1, 200, (number, length)))


def _overrides(folder: Path, tables: dict[str, dict[str, Any]]) -> list[str]:
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    held_out = {name: str(folder / f"{name}.parquet") for name in tables if name != "train"}
    return [
        f"model.path={folder / 'model'}",
        f"data.train={folder / 'train.parquet'}",
        *(f"data.held_out.{name}={path}" for name, path in held_out.items()),
    ]


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
