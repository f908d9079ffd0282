"""Tasks on whole sequences, one loss a sample, with a model of ``transformers`` that has a head for classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

from patterning_dist.data.sequences import SequenceTable
from patterning_dist.errors import PatterningError
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samples import Batch, Joined, Part, all_losses
from patterning_dist.tasks.base import CheckpointTask
from patterning_dist.tasks.held_out import held_out_ids
from patterning_dist.tasks.huggingface import HuggingFace
from patterning_dist.tasks.task import Metric

EVALUATION_BATCH = 64  # samples of one pass


class SequenceTask(CheckpointTask, ABC):
    """A ``Task``, see there, less its losses."""

    num_positions: int | None = None
    mean_counted: float | None = None
    correct: str  # what accuracy is about

    model: HuggingFace

    def __init__(self, model: HuggingFace, train: SequenceTable, held_out: Mapping[str, SequenceTable], **common: Any):
        super().__init__(model, train, held_out, **common)
        config = model.pretrained_config
        self.vocabulary_size: int = config.get_text_config().vocab_size
        self.pad = config.get_text_config().pad_token_id
        if self.pad is None:
            self.pad = self._unused_end()

    def _unused_end(self) -> int:
        """A pad for models without: they read the last token that is not one, so that no sequence may end with it."""
        used = set().union(*(samples.last_tokens() for samples in (self.train, *self.held_out.values())))
        free = next((token for token in range(self.vocabulary_size) if token not in used), None)
        if free is None:
            raise PatterningError(
                "model: config.json has no pad_token_id, and sequences end with every token that there is; name one "
                "that none ends with"
            )
        return free

    def scores(self, model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
        """float32 [sample, class] of sequences [sample, position], of which ``mask`` says what is no pad."""
        return self.model.scores(model, tokens.where(mask, self.pad), mask.long()).float()

    @abstractmethod
    def judge(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses, and whether the model is right, both [sample]."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[sample]."""
        return self.judge(model, batch)[0]

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the head reads of every sequence, side by side [sample, feature]."""
        sides = [name for name in self.train.columns if f"{name}_mask" in batch]
        return torch.cat([self._pooled(model, batch[name], batch[f"{name}_mask"]) for name in sides], dim=1)

    def _pooled(self, model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.model.pooled(model, tokens.where(mask, self.pad), mask.long())

    def skeleton(self) -> nn.Module:
        """Names and shapes."""
        return self._with_pad(super().skeleton())

    def build(self, seed: int) -> nn.Module:
        """Fresh weights."""
        return self._with_pad(super().build(seed))

    def load(self, checkpoint: str, ranks: Ranks) -> nn.Module:
        """A given checkpoint, or one that this run trained."""
        return self._with_pad(super().load(checkpoint, ranks))

    def _with_pad(self, model: Any) -> nn.Module:
        model.config.get_text_config().pad_token_id = self.pad
        return model

    @cached_property
    def _evaluated(self) -> tuple[Joined, np.ndarray, np.ndarray]:
        """Held-out samples that metrics are taken on, and the set and the domain of each."""
        seed, num = self._evaluation
        chosen = held_out_ids(self, seed, num, "realised")
        parts = [Part(self.held_out[name], ids) for name, ids in chosen.items()]
        sets = np.concatenate([np.full(len(ids), name, object) for name, ids in chosen.items()])
        return Joined(parts), sets, np.concatenate([self.held_out[name].domains[ids] for name, ids in chosen.items()])

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Loss and accuracy over all held-out sets, of every set, and accuracy of every domain."""
        if not self.held_out:
            return {}
        right = f"in which {self.correct}"
        found = {
            "validation_loss": Metric("validation loss", "nats", "mean loss on held-out samples"),
            "accuracy": Metric("accuracy", "share", f"share of held-out samples {right}"),
        }
        for name in self.held_out:
            found[f"{name}_loss"] = Metric(f"loss on {name}", "nats", f"mean loss of the held-out set {name}")
        for name in sorted(set(self._evaluated[2])):
            found[f"accuracy_{name}"] = Metric(f"accuracy on {name}", "share", f"share of the domain {name} {right}")
        return found

    def evaluate(self, model: nn.Module, ranks: Ranks) -> dict[str, float]:
        """See ``metrics``."""
        if not self.held_out:
            return {}
        samples, sets, domains = self._evaluated

        def both(batch: Batch) -> Tensor:
            return torch.stack([part.float() for part in self.judge(model, batch)], dim=1)

        losses, correct = all_losses(both, samples, ranks, EVALUATION_BATCH, self.device).T
        return {
            "validation_loss": losses.mean().item(),
            "accuracy": correct.mean().item(),
            **{f"{name}_loss": losses[sets == name].mean().item() for name in self.held_out},
            **{f"accuracy_{name}": correct[domains == name].mean().item() for name in sorted(set(domains))},
        }


class ClassificationTask(SequenceTask):
    """l = -log p(class | sequence)."""

    correct = "the right class has the highest score"

    def index(self, samples: SequenceTable, ids: np.ndarray) -> dict[str, np.ndarray]:
        """sample_id, domain and label."""
        assert samples.labels is not None
        return super().index(samples, ids) | {"label": samples.labels[ids]}

    def judge(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and whether the class is the likeliest."""
        scores = self.scores(model, batch["tokens"], batch["tokens_mask"])
        return cross_entropy(scores, batch["label"], reduction="none"), scores.argmax(dim=1) == batch["label"]


class PreferenceTask(SequenceTask):
    """l = -log sigmoid(r(chosen) - r(rejected)), r the model's score of a sequence (Bradley & Terry, 1952)."""

    correct = "the preferred sequence has the higher score"

    def judge(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both sequences take the same forward pass."""
        tokens = torch.cat([batch["chosen"], batch["rejected"]])
        mask = torch.cat([batch["chosen_mask"], batch["rejected_mask"]])
        chosen, rejected = self.scores(model, tokens, mask).squeeze(1).chunk(2)
        return softplus(rejected - chosen), chosen > rejected
