"""Per-token losses in nats."""

from __future__ import annotations

import torch
from torch import Tensor


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
