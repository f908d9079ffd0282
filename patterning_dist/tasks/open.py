"""From an experiment file and a run directory to the task."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

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
from patterning_dist.tasks.language import LanguageModel, LanguageTask
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


def open_skeleton(config: Config) -> nn.Module:
    """Names and shapes of an experiment's model; needs no data of a language model.

    Raises:
        PatterningError: the model is not there.
    """
    if not isinstance(config.data, TextConfig):
        return open_task(config, config.run_directory, "cpu").skeleton()
    return _model(config, config.data.vocabulary_size, config.data.context_length, "cpu", None).skeleton()


def _language(config: Config, directory: Path, device: str, dtype: torch.dtype | None) -> Task:
    train, held_out = _tokens(config, directory)
    model = _model(config, train.vocabulary_size, train.context_length, device, dtype)
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


def _model(
    config: Config, vocabulary_size: int | None, length: int, device: str, dtype: torch.dtype | None
) -> LanguageModel:
    from patterning_dist.tasks.attention_only import AttentionOnly
    from patterning_dist.tasks.huggingface import HuggingFace

    if isinstance(config.model, AttentionOnlyConfig):
        return AttentionOnly(config.model, vocabulary_size, length, device)
    assert isinstance(config.model, HuggingFaceConfig)
    return HuggingFace(config.model, vocabulary_size, length, device, dtype)


def _tokens(config: Config, directory: Path) -> tuple[Tokens, dict[str, Tokens]]:
    """Training and held-out sequences: what stage prepare wrote, or the user's own tables."""
    data = config.data
    if isinstance(data, TextConfig):
        train, validation = (TokenDataset(directory / "data" / f"{name}.parquet") for name in ("train", "validation"))
        return train, {"validation": validation}
    assert isinstance(data, TokensConfig)
    train = load_tokens(data.train, data.context_length, data.column)
    return train, {name: load_tokens(path, data.context_length, data.column) for name, path in data.held_out.items()}
