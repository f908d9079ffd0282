"""A small causal transformer that reads a bracket string and says at its end whether it is balanced."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from patterning_dist.experiments.two_rules.config import ClassifierConfig

_NUM_TOKENS = 3  # ")", "(" and END
_EPSILON = 1e-6


class BracketClassifier(nn.Module):
    """Logit of "balanced", read at END.

    Pre-norm blocks of attention and ReLU MLP, RMSNorm, learned positions. All of it is made of matrix products, so that
    ``torch.func.vmap`` stacks networks at the speed of batched products.

    Args:
        config: sizes.
        longest: brackets of the longest string.
    """

    def __init__(self, config: ClassifierConfig, longest: int) -> None:
        super().__init__()
        width = config.width
        self.token_embedding = nn.Parameter(torch.empty(_NUM_TOKENS, width))
        self.position_embedding = nn.Parameter(torch.empty(longest + 1, width))
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.norm = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, 1)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits [sample] of strings; tokens [sample, position], END at position `lengths` [sample]."""
        num_positions = tokens.shape[-1]
        x = functional.one_hot(tokens, _NUM_TOKENS).to(self.token_embedding.dtype) @ self.token_embedding
        x = x + self.position_embedding[:num_positions]
        hidden = torch.ones(num_positions, num_positions, dtype=torch.bool, device=x.device).triu(1)
        for layer in self.layers[:-1]:
            x = layer(x, x, hidden)
        # Nothing but END is read of the last layer, so nothing else is computed.
        at_end = functional.one_hot(lengths, num_positions).to(x.dtype).unsqueeze(-2)
        behind_end = (at_end @ hidden.to(x.dtype)).bool().unsqueeze(-3)
        x = self.layers[-1](x, at_end @ x, behind_end)
        return self.head(_normalised(x, self.norm))[..., 0, 0]


class _Layer(nn.Module):
    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.attention_norm, self.mlp_norm = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, config.feedforward), nn.Linear(config.feedforward, width)

    def forward(self, x: Tensor, asking: Tensor, hidden: Tensor) -> Tensor:
        """What becomes of the positions `asking` [sample, asking, coordinate], out of all positions `x`.

        hidden: [asking, position], or with leading axes, true where a position is not to be seen.
        """
        normalised = _normalised(x, self.attention_norm)
        key, value = self._heads(self.key(normalised)), self._heads(self.value(normalised))
        query = self._heads(self.query(normalised if asking is x else _normalised(asking, self.attention_norm)))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        mixed = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ value
        x = asking + self.output(mixed.transpose(-2, -3).flatten(-2))
        return x + self.down(self.up(_normalised(x, self.mlp_norm)).relu())

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)


def build_classifier(config: ClassifierConfig, longest: int, seed: int) -> BracketClassifier:
    """A fresh network, a function of the seed: matrices N(0, 1 / inputs), biases 0, gains 1; embeddings as asked."""
    model = BracketClassifier(config, longest)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                continue
            if parameter.dim() < 2:
                parameter.zero_()
            else:
                scale = config.embedding_scale if "embedding" in name else parameter.shape[-1] ** -0.5
                parameter.normal_(std=scale, generator=generator)
    return model


def _normalised(x: Tensor, gain: Tensor) -> Tensor:
    """x / rms(x) * gain (Zhang & Sennrich 1910.07467)."""
    return x * (x.square().mean(dim=-1, keepdim=True) + _EPSILON).rsqrt() * gain
