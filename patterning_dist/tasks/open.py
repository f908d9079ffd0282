"""From an experiment file and a run directory to the task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patterning_dist.config import (
    AttentionOnlyConfig,
    Config,
    FunctionDataConfig,
    HuggingFaceConfig,
    LabelledConfig,
    ModuleConfig,
    PairsConfig,
    TaskConfig,
    TextConfig,
    TokensConfig,
)
from patterning_dist.data.sequences import SequenceTable
from patterning_dist.data.tokenizer import text_tokenizer
from patterning_dist.data.tokens import TokenDataset
from patterning_dist.errors import PatterningError
from patterning_dist.functions import load_function
from patterning_dist.models.huggingface import model_location, open_saved_model
from patterning_dist.models.pretrained_config import Head
from patterning_dist.tasks.language import LanguageModel, LanguageTask
from patterning_dist.tasks.task import Task

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
    if isinstance(config.model, TaskConfig):
        return load_function(config.model.open, "model.open")(config, directory, device)
    if isinstance(config.model, ModuleConfig):
        assert isinstance(config.data, FunctionDataConfig)  # checked with the file
        from patterning_dist.tasks.module import ModuleTask

        return ModuleTask(
            config.model, config.data, folder=directory, device=device, seed=config.seed, compute_dtype=dtype
        )
    if isinstance(config.data, PairsConfig | LabelledConfig):
        return _sequences(config, config.data, directory, device, dtype)
    return _language(config, directory, device, dtype)


def open_skeleton(config: Config) -> nn.Module:
    """Names and shapes of an experiment's model; needs no data of a language model that exists.

    Raises:
        PatterningError: the model is not there.
    """
    data = config.data
    if isinstance(data, TextConfig) or (isinstance(data, TokensConfig) and config.model.given_checkpoints):
        vocabulary_size = _vocabulary_size(data) if isinstance(data, TextConfig) else None
        return _model(config, vocabulary_size, data.context_length, "cpu", None).skeleton()
    return open_task(config, Path(config.run_directory), "cpu").skeleton()


def _vocabulary_size(data: TextConfig) -> int:
    return data.vocabulary_size if data.tokenizer is None else text_tokenizer(data.tokenizer)[0].get_vocab_size()


def _language(config: Config, directory: Path, device: str, dtype: torch.dtype | None) -> Task:
    train, held_out = _tokens(config, directory)
    model = _model(config, _num_ids(train, held_out), train.context_length, device, dtype)
    return LanguageTask(model, train, held_out, **_common(config, directory, device, dtype))


def _sequences(
    config: Config, data: PairsConfig | LabelledConfig, directory: Path, device: str, dtype: torch.dtype | None
) -> Task:
    from patterning_dist.tasks.huggingface import HuggingFace
    from patterning_dist.tasks.sequences import ClassificationTask, PreferenceTask

    assert isinstance(config.model, HuggingFaceConfig)
    pairs = isinstance(data, PairsConfig)
    columns: dict[str, str]
    prompt: str | None = None
    label: str | None = None
    if isinstance(data, PairsConfig):
        columns, prompt = {"chosen": data.chosen, "rejected": data.rejected}, data.prompt
    else:
        columns, label = {"tokens": data.column}, data.label
    pad = _pad(config.model, "classes")

    def table(path: str) -> SequenceTable:
        return SequenceTable(path, data.context_length, columns, prompt, label, pad, data.tokenizer)

    train, held_out = table(data.train), {name: table(path) for name, path in data.held_out.items()}
    labels = [found for samples in (train, *held_out.values()) if (found := samples.labels) is not None]
    num_labels = 1 if pairs else 1 + max(int(found.max()) for found in labels)
    model = HuggingFace(config.model, _num_ids(train, held_out), data.context_length, device, dtype, num_labels)
    there = model.pretrained_config.num_labels
    if pairs and there != 1:
        raise PatterningError(
            f"model: gives {there} classes, and for data.kind pairs it must give one score (num_labels: 1)"
        )
    if there is None or there < num_labels:
        raise PatterningError(f"data.label: class {num_labels - 1} is there, and the model has {there} classes")
    kind = PreferenceTask if pairs else ClassificationTask
    return kind(model, train, held_out, **_common(config, directory, device, dtype))


def _common(config: Config, directory: Path, device: str, dtype: torch.dtype | None) -> dict[str, Any]:
    sequences = config.training.evaluation_sequences if config.training else config.sampling.evaluation_sequences
    return {
        "folder": directory,
        "given": tuple(config.model.given_checkpoints),
        "evaluation": (config.seed, sequences),
        "device": device,
        "compute_dtype": dtype,
    }


def _model(
    config: Config, vocabulary_size: int | None, length: int, device: str, dtype: torch.dtype | None
) -> LanguageModel:
    from patterning_dist.tasks.attention_only import AttentionOnly
    from patterning_dist.tasks.huggingface import HuggingFace

    if isinstance(config.model, AttentionOnlyConfig):
        assert vocabulary_size is not None  # texts and tables of tokens know it
        return AttentionOnly(config.model, vocabulary_size, length, device)
    assert isinstance(config.model, HuggingFaceConfig)
    return HuggingFace(config.model, vocabulary_size, length, device, dtype)


def _tokens(config: Config, directory: Path) -> tuple[TokenDataset, dict[str, TokenDataset]]:
    """Training and held-out sequences: what stage prepare wrote, or the user's own tables."""
    data = config.data
    if isinstance(data, TextConfig):
        train, validation = (TokenDataset(directory / "data" / f"{name}.parquet") for name in ("train", "validation"))
        return train, {"validation": validation}
    assert isinstance(data, TokensConfig)
    pad = _pad(config.model, "tokens") if isinstance(config.model, HuggingFaceConfig) else None

    def table(path: str) -> TokenDataset:
        return TokenDataset(path, data.context_length, data.column, pad, prompt=data.prompt, tokenizer=data.tokenizer)

    return table(data.train), {name: table(path) for name, path in data.held_out.items()}


def _pad(model: HuggingFaceConfig, head: Head) -> int | None:
    """The token that a model's rows are filled up with; None where it also ends texts, or is not said."""
    if model.architecture is not None:
        found = model.architecture
        return _apart(found.get("pad_token_id"), found.get("eos_token_id"), found.get("bos_token_id"))
    config = open_saved_model(*model_location(model, model.checkpoints[0]), head, fetch=False).config
    return _apart(config.pad_token_id, config.eos_token_id, config.bos_token_id)


def _apart(pad: int | None, *others: int | list[int] | None) -> int | None:
    used = [token for other in others for token in (other if isinstance(other, list) else [other])]
    return None if pad in used else pad


def _num_ids(train: Any, held_out: Mapping[str, Any]) -> int:
    """Size of the vocabulary: what tables or their tokenizer say, or the ids that there are."""
    every = (train, *held_out.values())
    return train.vocabulary_size or 1 + max(samples.max_token for samples in every)
