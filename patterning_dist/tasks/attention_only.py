"""The attention-only transformer as the model of a language task."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from patterning_dist.config import AttentionOnlyConfig, TrainingConfig
from patterning_dist.models.attention import AttentionOnlyTransformer
from patterning_dist.models.components import Component
from patterning_dist.models.losses import Tokens, counted_losses, token_ids, token_losses
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.tasks.optimizers import head_matrix_optimizer
from patterning_dist.tasks.task import TokenLosses


class AttentionOnly:
    """Small enough for one process; see ``LanguageModel`` for what the methods are for."""

    def __init__(self, config: AttentionOnlyConfig, vocabulary_size: int, context_length: int, device: str) -> None:
        self.config, self.vocabulary_size, self.context_length = config, vocabulary_size, context_length
        self.device = device

    def build(self, seed: int) -> AttentionOnlyTransformer:
        """Fresh weights from a seed."""
        model = AttentionOnlyTransformer(self.config, self.vocabulary_size, self.context_length, seed)
        return model.to(self.device)

    def load(self, folder: Path, ranks: Ranks) -> AttentionOnlyTransformer:
        """The weights of ``folder/model.safetensors``; on one rank, as the experiment file is checked for."""
        model = self.build(0)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.to(self.device).eval()

    def skeleton(self) -> AttentionOnlyTransformer:
        """Without weights: sizes may be those of a mistake."""
        with torch.device("meta"):
            return AttentionOnlyTransformer(self.config, self.vocabulary_size, self.context_length)

    def token_losses(self, model: nn.Module, tokens: Tensor, **arguments: Tensor) -> Tensor:
        """[sample, position - 1]."""
        return token_losses(model(tokens[:, :-1]), tokens)

    def patterns(self, model: nn.Module, inputs: Tensor) -> list[Tensor]:
        """Attention probabilities of every layer, each [sample, head, query position, key position]."""
        return model(inputs, return_patterns=True)[1]

    def without_head(self, layer: int, head: int) -> TokenLosses:
        """``token_losses`` where the output of a head is 0."""
        return lambda model, tokens: token_losses(model(tokens[:, :-1], ablated=(layer, head)), tokens)

    def layered(self, model: AttentionOnlyTransformer, component: Component) -> LayersAbove:
        """The model cut below a component."""
        return LayersAbove(model, component)

    def optimizer(self, model: nn.Module, settings: TrainingConfig) -> Optimizer:
        """Muon or AdamW for the heads' matrices, Adam for the rest."""
        return head_matrix_optimizer(model, settings)

    def describe(self, folder: Path) -> None:
        """Nothing: the experiment file has the sizes."""


class LayersAbove:
    """A ``Layered`` model; where the embedding moves, all of it lies above."""

    def __init__(self, model: AttentionOnlyTransformer, component: Component) -> None:
        self.model, self.first = model, component.first_layer
        self._embedding_moves = "embedding" in component.parameters

    def below(self, batch: Tokens) -> Tensor:
        """The residual stream that enters the component's first layer; token ids where the embedding moves."""
        inputs = token_ids(batch)[:, :-1]
        if self._embedding_moves:
            return inputs
        x = self.model.embed(inputs)
        for layer in self.model.layers[: self.first]:
            x = layer(x)
        return x

    def above(self, state: Tensor, batch: Tokens) -> Tensor:
        """Losses of the predicted tokens."""
        x = self.model.embed(state) if self._embedding_moves else state
        for layer in self.model.layers[self.first :]:
            x = layer(x)
        return counted_losses(token_losses(self.model.unembed(x), token_ids(batch)), batch)
