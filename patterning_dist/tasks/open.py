"""From an experiment file and a run directory to the task."""

from __future__ import annotations

from pathlib import Path

import torch

from patterning_dist.config import (
    AttentionOnlyConfig,
    Config,
    FunctionDataConfig,
    HuggingFaceConfig,
    ModuleConfig,
    TextConfig,
    TokensConfig,
)
from patterning_dist.data.tokenised import TokenBlocks, load_tokens
from patterning_dist.data.tokens import TokenDataset
from patterning_dist.tasks.task import Task

Tokens = TokenDataset | TokenBlocks

_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


def open_task(config: Config, directory: Path, device: str) -> Task:
    """The task of an experiment, in any process that sees the run directory.

    Args:
        config: of the run.
        directory: of the run: data/ of stage prepare and the run's own checkpoints are read there.
        device: torch device of models and batches.

    Raises:
        PatterningError: model and data do not go together, or something is not there.
    """
    dtype = _DTYPES[config.sampling.compute_dtype]
    if isinstance(config.model, ModuleConfig):
        assert isinstance(config.data, FunctionDataConfig)  # checked with the file
        from patterning_dist.tasks.module import ModuleTask

        return ModuleTask(config.model, config.data, folder=directory, device=device, compute_dtype=dtype)
    return _language(config, directory, device, dtype)


def _language(config: Config, directory: Path, device: str, dtype: torch.dtype | None) -> Task:
    from patterning_dist.tasks.attention_only import AttentionOnly
    from patterning_dist.tasks.huggingface import HuggingFace
    from patterning_dist.tasks.language import LanguageTask

    train, held_out = _tokens(config, directory)
    vocabulary_size, length = train.vocabulary_size, train.context_length
    if isinstance(config.model, AttentionOnlyConfig):
        model = AttentionOnly(config.model, vocabulary_size, length, device)
    else:
        assert isinstance(config.model, HuggingFaceConfig)
        model = HuggingFace(config.model, vocabulary_size, length, device, dtype)
    sequences = config.training.evaluation_sequences if config.training else config.sampling.evaluation_sequences
    return LanguageTask(
        model,
        train,
        held_out,
        folder=directory,
        given=tuple(config.model.given_checkpoints),
        evaluation=(config.seed, sequences),
        device=device,
        compute_dtype=dtype,
    )


def _tokens(config: Config, directory: Path) -> tuple[Tokens, dict[str, Tokens]]:
    """Training and held-out sequences: what stage prepare wrote, or the user's own tables."""
    data = config.data
    if isinstance(data, TextConfig):
        train, validation = (TokenDataset(directory / "data" / f"{name}.parquet") for name in ("train", "validation"))
        return train, {"validation": validation}
    assert isinstance(data, TokensConfig)
    train = load_tokens(data.train, data.context_length, data.column)
    return train, {name: load_tokens(path, data.context_length, data.column) for name, path in data.held_out.items()}
