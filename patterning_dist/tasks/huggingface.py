"""A causal language model of ``transformers`` as the model of a language task: one that exists, or a fresh one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from patterning_dist.config import HuggingFaceConfig, TrainingConfig
from patterning_dist.errors import PatterningError
from patterning_dist.models.components import Component
from patterning_dist.models.huggingface import (
    fresh_language_model,
    language_model_skeleton,
    load_language_model,
    model_config,
    model_location,
    read_config,
)
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.shard_loading import load_sharded_language_model
from patterning_dist.tasks.optimizers import plain_optimizer
from patterning_dist.tasks.task import FileHash

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PretrainedConfig

_MODEL_FILES = ("*.safetensors", "*.json")


class HuggingFace:
    """See ``LanguageModel`` for what the methods are for.

    Args:
        config: of the model; with ``architecture``, vocabulary and positions are filled in from the data.
        vocabulary_size: of the data's tokenizer; None where the data does not know it.
        context_length: of a sample [tokens].
        device: torch device.
        compute_dtype: of forward passes under autocast; None: float32.
    """

    def __init__(
        self,
        config: HuggingFaceConfig,
        vocabulary_size: int | None,
        context_length: int,
        device: str,
        compute_dtype: torch.dtype | None,
    ) -> None:
        self.config, self.device, self.compute_dtype = config, device, compute_dtype
        self._data = {"max_position_embeddings": context_length}
        if vocabulary_size is not None:
            self._data["vocab_size"] = vocabulary_size

    @property
    def pretrained_config(self) -> PretrainedConfig:
        """Of the first checkpoint, or of the model that is trained here."""
        if self.config.architecture is not None:
            return model_config(self._data | self.config.architecture)
        return read_config(*model_location(self.config, self.config.checkpoints[0]))

    def build(self, seed: int) -> nn.Module:
        """Fresh weights from a seed, in the architecture of the model."""
        return fresh_language_model(self.pretrained_config, seed).to(self.device)

    def load(self, folder: Path, ranks: Ranks) -> nn.Module:
        """A model that a training of this run wrote."""
        return self._load(str(folder), None, ranks)

    def load_given(self, checkpoint: str, ranks: Ranks) -> nn.Module:
        """A checkpoint that was there before the run."""
        return self._load(*model_location(self.config, checkpoint), ranks)

    def _load(self, path: str, revision: str | None, ranks: Ranks) -> nn.Module:
        if ranks.size == 1:
            return load_language_model(path, revision, self.device)
        return load_sharded_language_model(path, revision, ranks, self.device, compute_dtype=self.compute_dtype)

    def skeleton(self) -> nn.Module:
        """Names and shapes; no weights are read."""
        if self.config.architecture is not None:
            with torch.device("meta"):
                return fresh_language_model(self.pretrained_config, None)
        return language_model_skeleton(*model_location(self.config, self.config.checkpoints[0]))

    def logits(self, model: nn.Module, inputs: Tensor, **arguments: Tensor) -> Tensor:
        """[sample, position, vocabulary]; ``arguments`` are attention_mask and position_ids where samples have them.

        Raises:
            PatterningError: sequences longer than the model has positions for.
        """
        length, limit = inputs.shape[1], getattr(model.config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise PatterningError(
                f"sequences of {length + 1} tokens need {length} positions, and the model has {limit}; "
                f"set the context length to {limit + 1} or less"
            )
        return model(input_ids=inputs, use_cache=False, **arguments).logits

    def patterns(self, model: nn.Module, inputs: Tensor) -> list[Tensor]:
        """Attention probabilities of every layer, each [sample, head, query position, key position]."""
        attentions = model(input_ids=inputs, use_cache=False, output_attentions=True).attentions
        return [pattern for pattern in attentions or () if pattern is not None]

    def layered(self, model: nn.Module, component: Component) -> None:
        """Not known: every pass is a whole one."""
        return None

    def optimizer(self, model: nn.Module, settings: TrainingConfig) -> Optimizer:
        """AdamW."""
        return plain_optimizer(model, settings)

    def describe(self, folder: Path) -> None:
        """config.json, so that the folder is one that ``from_pretrained`` reads."""
        self.pretrained_config.save_pretrained(folder)

    def files_fingerprint(self, checkpoint: str, sha256: FileHash) -> Any:
        """Hashes of a given checkpoint's files; of one on the hub its name and revision."""
        path, revision = model_location(self.config, checkpoint)
        if not Path(path).is_dir():
            return [path, revision]
        files = sorted(entry for pattern in _MODEL_FILES for entry in Path(path).glob(pattern))
        return {file.name: sha256(file) for file in files}
