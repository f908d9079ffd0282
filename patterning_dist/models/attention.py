"""The two-layer attention-only transformer in which an induction circuit forms.

    x_0 = E[tokens]
    x_{l+1} = x_l + sum_h softmax( q_h k_h^T / sqrt(d_head) + b_h + causal ) v_h O_h
    q_h, k_h, v_h = rmsnorm(x_l) (Q, K, V)_h
    logits = rmsnorm(x_num_layers) U

The frame is Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021). b_h is a learnable bias over
the distance between query and key. It stands in the lowest layer only: there it lets a previous-token head form, and
higher up it would pull heads towards their neighbourhood instead of towards content. With ``position_bias_init`` > 0
head h starts out preferring the token h + 1 back, as convolutional initialisations of attention do (d'Ascoli et al.,
"ConViT", 2021): the lower half of the induction circuit is then there from the start, and only the upper half has to
be learnt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from patterning_dist.config import AttentionOnlyConfig
from patterning_dist.models.components import Component, Piece, pieces_of

EPS = 1e-6  # of the norms


class AttentionLayer(nn.Module):
    """One residual attention layer: x <- x + Attention(rmsnorm(x)).

    Weights are kept one matrix a head, so that a head is a slice along axis 0:
    query, key, value [num_heads, d_model, d_head], output [num_heads, d_head, d_model],
    position_bias [num_heads, context_length] (only if ``relative_position_bias``).
    """

    causal_mask: Tensor
    distance: Tensor

    def __init__(
        self, num_heads: int, d_model: int, d_head: int, context_length: int, relative_position_bias: bool
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(num_heads, d_model, d_head))
        self.key = nn.Parameter(torch.empty(num_heads, d_model, d_head))
        self.value = nn.Parameter(torch.empty(num_heads, d_model, d_head))
        self.output = nn.Parameter(torch.empty(num_heads, d_head, d_model))
        position = torch.arange(context_length)
        distance = position[:, None] - position[None, :]
        causal_mask = torch.zeros(context_length, context_length).masked_fill(distance < 0, -torch.inf)
        self.register_buffer("causal_mask", causal_mask, persistent=False)
        self.register_buffer("distance", distance.clamp(min=0), persistent=False)
        if relative_position_bias:
            self.position_bias = nn.Parameter(torch.zeros(num_heads, context_length))

    def forward(
        self, x: Tensor, return_pattern: bool = False, ablated: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Map the residual stream x [batch, position, d_model] to the next one, same shape.

        With ``return_pattern`` also the attention probabilities [batch, head, query position, key position]. What the
        head ``ablated`` adds is 0.
        """
        heads, pattern = self.heads(rms_norm(x), slice(None))
        if ablated is not None:
            heads.unflatten(-1, self.output.shape[:2])[..., ablated, :] = 0
        x = x + heads @ self.output.flatten(0, 1)
        return (x, pattern) if return_pattern else x

    def heads(self, x: Tensor, which: slice | list[int]) -> tuple[Tensor, Tensor]:
        """Outputs [batch, position, head * d_head] and patterns of some of the heads, from normed x."""
        batch, length, d_model = x.shape
        query, key, value = self.query[which], self.key[which], self.value[which]
        num_heads, _, d_head = query.shape
        # One product for queries, keys and values of all heads, one for their outputs: one a head would copy more.
        inputs = torch.cat([query / math.sqrt(d_head), key, value])  # [3 head, d_model, d_head]
        projected = x @ inputs.transpose(0, 1).reshape(d_model, -1)
        query, key, value = projected.view(batch, length, 3, num_heads, d_head).permute(2, 0, 3, 1, 4)
        mask = self.causal_mask[:length, :length]
        if hasattr(self, "position_bias"):
            mask = mask + self.position_bias[which][:, self.distance[:length, :length]]
        pattern = (query @ key.transpose(-1, -2) + mask).softmax(dim=-1)
        return (pattern @ value).transpose(1, 2).flatten(2), pattern


class AttentionOnlyTransformer(nn.Module):
    """Attention-only language model over blocks of tokens.

    ``embed`` -> ``layers[0..n)`` -> ``unembed`` are separate, so that what lies below and beside a component under
    study can be computed once and kept (see ``sampling.layered.Layered``).

    Args:
        config: sizes, and how weights begin.
        vocabulary_size: of the tokens.
        context_length: longest sequence [tokens].
        seed: of the weights.
    """

    def __init__(self, config: AttentionOnlyConfig, vocabulary_size: int, context_length: int, seed: int = 0) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.context_length = context_length
        self.embedding = nn.Parameter(torch.empty(vocabulary_size, config.d_model))
        # A ModuleList has no type of what is in it.
        self.layers: Sequence[AttentionLayer] = nn.ModuleList(  # type: ignore[assignment]
            AttentionLayer(
                config.num_heads, config.d_model, config.d_head, context_length, layer in config.relative_position_bias
            )
            for layer in range(config.num_layers)
        )
        self.unembedding = nn.Parameter(torch.empty(config.d_model, vocabulary_size))
        self._initialise(config.embedding_std, config.position_bias_init, seed)

    def _initialise(self, embedding_std: float, position_bias_init: float, seed: int) -> None:
        """Gaussian weights of variance 1/fan-in (embedding: given std), from a generator of their own."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.embedding.normal_(0, embedding_std, generator=generator)
            self.unembedding.normal_(0, self.unembedding.shape[0] ** -0.5, generator=generator)
            for layer in self.layers:
                for weight in (layer.query, layer.key, layer.value):
                    weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
                num_heads, d_head, _ = layer.output.shape
                layer.output.normal_(0, (num_heads * d_head) ** -0.5, generator=generator)
                if hasattr(layer, "position_bias"):
                    for head in range(min(num_heads, self.context_length - 1)):
                        layer.position_bias[head, head + 1] = position_bias_init

    def embed(self, tokens: Tensor) -> Tensor:
        """Residual stream [batch, position, d_model] of token ids [batch, position]."""
        return nn.functional.embedding(tokens, self.embedding)

    def unembed(self, x: Tensor) -> Tensor:
        """Logits [batch, position, vocabulary] of the last residual stream."""
        return rms_norm(x) @ self.unembedding

    def forward(
        self, tokens: Tensor, return_patterns: bool = False, ablated: tuple[int, int] | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits [batch, position, vocabulary] of token ids [batch, position].

        With ``return_patterns`` also the attention probabilities of every layer, each [batch, head, query position,
        key position]: through the forward passes of the layers, since engines have weights in place only there.
        What the head ``ablated`` (layer, head) adds is 0.
        """
        x, patterns = self.embed(tokens), []
        for number, layer in enumerate(self.layers):
            head = ablated[1] if ablated and ablated[0] == number else None
            if return_patterns:
                x, pattern = layer(x, return_pattern=True, ablated=head)
                patterns.append(pattern)
            else:
                x = layer(x, ablated=head)
        logits = self.unembed(x)
        return (logits, patterns) if return_patterns else logits

    def components(self) -> dict[str, Component]:
        """everything, attention, embedding, unembedding, layer.N, layer.N.attention, layer.N.head.M.

        A head is the slice ``[M]`` along axis 0 of every parameter of its layer.
        """

        def part(name: str, prefix: str, first_layer: int) -> Component:
            return Component(name, pieces_of(self, prefix), first_layer)

        found = [part("everything", "", 0), part("attention", "layers.", 0), part("embedding", "embedding", 0)]
        heads = []
        for number, layer in enumerate(self.layers):
            prefix = f"layers.{number}."
            found += [part(f"layer.{number}", prefix, number), part(f"layer.{number}.attention", prefix, number)]
            whole = pieces_of(self, prefix)
            for head in range(layer.query.shape[0]):
                pieces = tuple(Piece.along(piece.parameter, piece.shape, 0, head, head + 1) for piece in whole)
                heads.append(Component(f"layer.{number}.head.{head}", pieces, number))
        found += [*heads, part("unembedding", "unembedding", len(self.layers))]
        return {component.name: component for component in found}


def rms_norm(x: Tensor) -> Tensor:
    """x over its root mean square, of the last axis."""
    return nn.functional.rms_norm(x, x.shape[-1:], eps=EPS)
