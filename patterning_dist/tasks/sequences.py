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
from patterning_dist.sampling.samples import Batch, Joined, Part, Samples, all_losses
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

    def index(self, samples: SequenceTable, ids: np.ndarray) -> dict[str, np.ndarray]:
        """sample_id and domain, and document and label where they are known."""
        known = {"document": samples.documents, "label": samples.labels}
        return super().index(samples, ids) | {key: v[ids] for key, v in known.items() if v is not None}

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
    def _evaluated(self) -> dict[str, np.ndarray]:
        """Held-out samples that metrics are taken on, set by set."""
        return held_out_ids(self, *self._evaluation, "realised")

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
        for name in _domains(self, self._evaluated):
            found[f"accuracy_{name}"] = Metric(f"accuracy on {name}", "share", f"share of the domain {name} {right}")
        return found

    def evaluate(self, model: nn.Module, ranks: Ranks) -> dict[str, float]:
        """See ``metrics``."""
        found = self.outcomes(model, self._evaluated, ranks)
        return {name: float(values.mean(where=~np.isnan(values))) for name, values in found.items()}

    def outcomes(self, model: nn.Module, ids: Mapping[str, np.ndarray], ranks: Ranks) -> dict[str, np.ndarray]:
        """What every sample adds to ``metrics``, which are means of it."""
        if not ids:
            return {}
        samples = Joined([Part(self.held_out[name], chosen) for name, chosen in ids.items()])

        def both(batch: Batch) -> Tensor:
            return torch.stack([part.float() for part in self.judge(model, batch)], dim=1)

        losses, correct = all_losses(both, samples, ranks, EVALUATION_BATCH, self.device).numpy().T
        sets = np.concatenate([np.full(len(chosen), name, object) for name, chosen in ids.items()])
        domains = np.concatenate([self.held_out[name].domains[chosen] for name, chosen in ids.items()])
        return {
            "validation_loss": losses,
            "accuracy": correct,
            **{f"{name}_loss": np.where(sets == name, losses, np.nan) for name in ids},
            **{f"accuracy_{name}": np.where(domains == name, correct, np.nan) for name in _domains(self, ids)},
        }


def _domains(task: SequenceTask, ids: Mapping[str, np.ndarray]) -> list[str]:
    """Of held-out samples, set -> ids."""
    return sorted({str(domain) for name, chosen in ids.items() for domain in task.held_out[name].domains[chosen]})


class ClassificationTask(SequenceTask):
    """l = -log p(class | sequence)."""

    correct = "the right class has the highest score"

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

    def swap(self, where: str, swapped: np.ndarray) -> Samples:
        """What was rejected is chosen: l = -log sigmoid(r(rejected) - r(chosen))."""
        return SwappedPairs(self.train, swapped)


class SwappedPairs:
    """Pairs in some of which, bool [sample], the chosen and the rejected sequence have changed places."""

    def __init__(self, pairs: Samples, swapped: np.ndarray) -> None:
        self.pairs, self.swapped = pairs, torch.from_numpy(swapped)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, ids: Any) -> Batch:
        batch, swapped = self.pairs[ids], self.swapped[torch.as_tensor(ids)][:, None]
        both = {"chosen": "rejected", "chosen_mask": "rejected_mask"}
        changed = {a: batch[b].where(swapped, batch[a]) for a, b in (both | {b: a for a, b in both.items()}).items()}
        return batch | changed
