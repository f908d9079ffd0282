"""The attention-only transformer as the model of a language task."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from patterning_dist.config import AttentionOnlyConfig, TrainingConfig
from patterning_dist.models.attention import EPS, AttentionOnlyTransformer, rms_norm
from patterning_dist.models.components import Component, num_bytes
from patterning_dist.models.losses import Tokens, counted_losses, token_ids, token_losses
from patterning_dist.models.readout import Readout
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

    def embeddings(self, model: Any) -> Tensor:
        """[token, d_model]."""
        return model.embedding

    def states(self, model: Any, tokens: Tensor, **arguments: Tensor) -> Tensor:
        """The last residual stream, normed [sample, position - 1, d_model]."""
        x = model.embed(tokens[:, :-1])
        for layer in model.layers:
            x = layer(x)
        return rms_norm(x)

    def patterns(self, model: nn.Module, inputs: Tensor) -> list[Tensor]:
        """Attention probabilities of every layer, each [sample, head, query position, key position]."""
        return model(inputs, return_patterns=True)[1]

    def without_head(self, layer: int, head: int) -> TokenLosses:
        """``token_losses`` where the output of a head is 0."""
        return lambda model, tokens: token_losses(model(tokens[:, :-1], ablated=(layer, head)), tokens)

    def layered(self, model: AttentionOnlyTransformer, component: Component) -> LayersAbove:
        """The model cut around a component."""
        return LayersAbove(model, component)

    def optimizer(self, model: nn.Module, settings: TrainingConfig) -> Optimizer:
        """Muon or AdamW for the heads' matrices, Adam for the rest."""
        return head_matrix_optimizer(model, settings)

    def describe(self, folder: Path) -> None:
        """Nothing: the experiment file has the sizes."""


class Beside(NamedTuple):
    """What does not move where heads of one layer do.

    ``inputs``: of the layer, normed; ``base``: its output without what the heads add; ``table``: of ``Readout``.
    """

    inputs: Tensor
    base: Tensor
    table: Tensor | None


class LayersAbove:
    """A ``Layered`` model; where the embedding moves, all of it lies above."""

    pays_once = True  # 1.4 to 1.9 times: the whole pass has gradients of all heads

    def __init__(self, model: AttentionOnlyTransformer, component: Component) -> None:
        self.model, self._embedding_moves = model, "embedding" in component.parameters
        layers = {parameter.rpartition(".")[0] for parameter in component.parameters}
        self._heads: list[int] | None = None
        self.first = component.first_layer
        if len(layers) == 1 and (number := next(iter(layers))).startswith("layers."):
            self.first = int(number.removeprefix("layers."))
            self._heads = sorted({head for piece in component.pieces for head in range(*piece.box[0])})
        self._readout = None if "unembedding" in component.parameters else Readout(model.unembedding, EPS)
        last, num_directions = (
            self.first == len(model.layers) - 1,
            len(self._heads or ()) * model.layers[0].query.shape[2],
        )
        self._has_table = last and self._readout is not None and self._readout.pays(num_directions)

    def below(self, batch: Tokens, room: int) -> Tensor | Beside:
        """The residual stream that enters the component's first layer; token ids where the embedding moves.

        Of heads of one layer, that layer without them.
        """
        inputs = token_ids(batch)[:, :-1]
        if self._embedding_moves:
            return inputs
        x = self.model.embed(inputs)
        for layer in self.model.layers[: self.first]:
            x = layer(x)
        if self._heads is None:
            return x
        layer, normed = self.model.layers[self.first], rms_norm(x)
        others = [head for head in range(len(layer.query)) if head not in self._heads]
        if others:
            x = x + layer.heads(normed, others)[0] @ layer.output[others].flatten(0, 1)
        table = None
        kept = num_bytes((normed, x))
        if self._readout is not None and self._has_table and kept + self._readout.table_bytes(x) <= room:
            table = self._readout.table(x)
        return Beside(normed, x, table)

    def above(self, state: Tensor | Beside, batch: Tokens) -> Tensor:
        """Losses of the predicted tokens."""
        tokens = token_ids(batch)
        if isinstance(state, Tensor):
            x = self.model.embed(state) if self._embedding_moves else state
            return counted_losses(self._losses(x, self.first, tokens), batch)
        assert self._heads is not None
        layer, which = self.model.layers[self.first], _index(self._heads)
        heads, output = layer.heads(state.inputs, which)[0], layer.output[which].flatten(0, 1)
        if self._readout is not None and state.table is not None and not torch.is_grad_enabled():
            losses = self._readout.losses_by_table(state.table, state.base, heads, output, tokens[:, 1:])
        else:
            losses = self._losses(state.base + heads @ output, self.first + 1, tokens)
        return counted_losses(losses, batch)

    def _losses(self, x: Tensor, first: int, tokens: Tensor) -> Tensor:
        for layer in self.model.layers[first:]:
            x = layer(x)
        if self._readout is not None:
            return self._readout.losses(x, tokens[:, 1:])
        return token_losses(self.model.unembed(x), tokens)


def _index(heads: list[int]) -> slice | list[int]:
    """A view where they lie side by side."""
    return slice(heads[0], heads[-1] + 1) if heads[-1] - heads[0] + 1 == len(heads) else heads
