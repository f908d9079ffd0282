"""Per-token losses in nats."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Tokens = Tensor | Mapping[str, Tensor]  # ids [sample, position], or with masks: see ``data.tokens.TokenDataset``


def batch_losses(logits: Tensor, batch: Tokens) -> Tensor:
    """``token_losses`` of a batch, 0 where a token does not count."""
    if isinstance(batch, Tensor):
        return token_losses(logits, batch)
    return torch.where(batch["counted"], token_losses(logits, batch["tokens"]), 0.0)


def token_ids(batch: Tokens) -> Tensor:
    """[sample, position]."""
    return batch if isinstance(batch, Tensor) else batch["tokens"]


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of every predicted token, l(x, y) = -log p(y | x) in nats.

    Args:
        logits: [batch, position, vocabulary] for the inputs ``tokens[:, :-1]``; any dtype. They are widened to float32
            first, since bfloat16 losses near 3.0 are 0.016 apart.
        tokens: [batch, position + 1] token ids.

    Returns:
        [batch, position] float32; column p is the loss of ``tokens[:, p + 1]``.
    """
    flat = logits.float().flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(flat, tokens[:, 1:].reshape(-1), reduction="none")
    return losses.view(tokens.shape[0], -1)
