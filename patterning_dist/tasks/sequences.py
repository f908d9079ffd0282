"""What tasks on whole sequences share: a model of ``transformers`` with a head for classes, one loss a sample."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patterning_dist.data.sequences import SequenceTable
from patterning_dist.errors import PatterningError
from patterning_dist.sampling.batches import all_losses
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samples import Batch, Joined, Part
from patterning_dist.storage.files import file_sha256
from patterning_dist.tasks.base import PlainTask
from patterning_dist.tasks.held_out import held_out_ids
from patterning_dist.tasks.huggingface import HuggingFace
from patterning_dist.tasks.task import FileHash, Metric, weights_fingerprint

_BATCH = 64


class SequenceTask(PlainTask):
    """A ``Task``, see there, less its losses.

    Args:
        model: the architecture.
        train, held_out: sequences.
        folder: of the run's own checkpoints, ``<folder>/<checkpoint>/model.safetensors``.
        given: names of checkpoints that were there before the run.
        evaluation: seed and number of the samples of a held-out set that metrics are taken on.
        device: torch device.
        compute_dtype: of forward passes under autocast, where it is not float32.
    """

    num_positions: int | None = None
    mean_counted: float | None = None
    correct: str  # what accuracy is about

    def __init__(
        self,
        model: HuggingFace,
        train: SequenceTable,
        held_out: Mapping[str, SequenceTable],
        *,
        folder: Path,
        given: tuple[str, ...],
        evaluation: tuple[int, int],
        device: str,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.train, self.held_out = model, train, held_out
        self.folder, self.given, self.device = folder, given, device
        self._evaluation, self.compute_dtype = evaluation, compute_dtype
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
        return self.model.logits(model, tokens.where(mask, self.pad), attention_mask=mask.long()).float()

    def judge(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses, and whether the model is right, both [sample]."""
        raise NotImplementedError

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[sample]."""
        return self.judge(model, batch)[0]

    def build(self, seed: int) -> nn.Module:
        """Fresh weights."""
        return self._with_pad(self.model.build(seed))

    def load(self, checkpoint: str, ranks: Ranks) -> nn.Module:
        """A given checkpoint, or one that this run trained."""
        if checkpoint in self.given:
            return self._with_pad(self.model.load_given(checkpoint, ranks))
        return self._with_pad(self.model.load(self.folder / checkpoint, ranks))

    def _with_pad(self, model: Any) -> nn.Module:
        model.config.get_text_config().pad_token_id = self.pad
        return model

    def skeleton(self) -> nn.Module:
        """Names and shapes."""
        return self.model.skeleton()

    def index(self, samples: SequenceTable, ids: np.ndarray) -> dict[str, np.ndarray]:
        """sample_id and domain."""
        return {self.key: np.asarray(ids), "domain": samples.domains[ids]}

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

        losses, correct = all_losses(both, samples, ranks, _BATCH, self.device).T
        return {
            "validation_loss": losses.mean().item(),
            "accuracy": correct.mean().item(),
            **{f"{name}_loss": losses[sets == name].mean().item() for name in self.held_out},
            **{f"accuracy_{name}": correct[domains == name].mean().item() for name in sorted(set(domains))},
        }

    def describe(self, folder: Path) -> None:
        """Of the architecture."""
        self.model.describe(folder)

    def fingerprint(self, checkpoint: str | None = None, sha256: FileHash = file_sha256) -> Any:
        """Hashes of the sequences, and of a checkpoint's files."""
        held_out = {name: samples.sha256 for name, samples in self.held_out.items()}
        return [self.train.sha256, held_out, *weights_fingerprint(self, checkpoint, sha256)]
