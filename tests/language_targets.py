"""A language task over arrays of tokens, and chain targets of it, for tests that need no run directory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from patterning_dist.config import AttentionOnlyConfig
from patterning_dist.models.components import select_component
from patterning_dist.sampling.target import Target
from patterning_dist.tasks.attention_only import AttentionOnly
from patterning_dist.tasks.held_out import held_out_splits
from patterning_dist.tasks.language import LanguageTask


class Sequences:
    """Token ids [sequence, position] as ``TokenSamples``; ``asked`` remembers the ids of every batch."""

    def __init__(self, tokens, domains=None, counted=None):
        self.all, self.mask, self.asked = np.asarray(tokens), counted, []
        self.domains = np.full(len(self.all), "held_out", object) if domains is None else domains
        self.context_length, self.documents = self.all.shape[1], np.arange(len(self.all))
        self.mean_counted = None if counted is None else counted.sum() / len(counted)

    def __len__(self):
        return len(self.all)

    def __getitem__(self, ids):
        self.asked.append(np.asarray(ids).tolist())
        return torch.from_numpy(self.all[np.asarray(ids)])

    def tokens(self, ids):
        return self.all[ids]

    document_tokens = tokens

    def counted(self, ids):
        return None if self.mask is None else self.mask[ids]


def language_task(train, held_out, *, domains=None, vocabulary_size=31, **sizes):
    """Two layers of two heads, all held-out sequences in one set."""
    sizes = {"num_layers": 2, "num_heads": 2, "d_model": 8, "d_head": 4} | sizes
    train = train if isinstance(train, Sequences) else Sequences(train)
    model = AttentionOnly(AttentionOnlyConfig(**sizes), vocabulary_size, train.all.shape[1], "cpu")
    sets = {"held_out": Sequences(held_out, domains)}
    return LanguageTask(model, train, sets, folder=Path(), given=(), evaluation=(0, 8), device="cpu")


def whole_sets(task):
    """All held-out samples, for ``held_out_splits``."""
    return {name: np.arange(len(samples)) for name, samples in task.held_out.items()}


def language_target(task, component, probe, *, splits=None, seed=1, layered=True, **options):
    """A target over a fresh model, with the split losses over all held-out sequences."""
    model = task.build(seed)
    chosen = select_component(model, component)
    held_out = held_out_splits(task, whole_sets(task), splits or {})
    if held_out is not None:
        options |= {"held_out": held_out.samples, "coefficients": held_out.coefficients}
    options = {"num_component_losses": 1, "layered": task.layered(model, chosen) if layered else None} | options
    return Target(model, chosen, task.losses, task.train, torch.as_tensor(probe), **options)
