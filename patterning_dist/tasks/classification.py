"""Classifiers: a sample is a sequence with a class."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from patterning_dist.data.sequences import SequenceTable
from patterning_dist.sampling.samples import Batch
from patterning_dist.tasks.sequences import SequenceTask


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
