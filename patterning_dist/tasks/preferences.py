"""Reward models: a sample is a pair of sequences, of which one is preferred."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from patterning_dist.sampling.samples import Batch
from patterning_dist.tasks.sequences import SequenceTask


class PreferenceTask(SequenceTask):
    """l = -log sigmoid(r(chosen) - r(rejected)), r the model's score of a sequence (Bradley & Terry, 1952)."""

    correct = "the preferred sequence has the higher score"

    def judge(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both sequences take the same forward pass."""
        tokens = torch.cat([batch["chosen"], batch["rejected"]])
        mask = torch.cat([batch["chosen_mask"], batch["rejected_mask"]])
        chosen, rejected = self.scores(model, tokens, mask).squeeze(1).chunk(2)
        return softplus(rejected - chosen), chosen > rejected
