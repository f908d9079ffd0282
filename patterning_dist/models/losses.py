"""Per-token losses in nats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Tokens = Tensor | Mapping[str, Tensor]  # ids [sample, position], or with masks: see ``data.tokens.TokenDataset``


# Logits that are in memory at once: 128 MB in float32. Those of smaller batches are computed in one piece.
CHUNK = 1 << 25


def counted_losses(losses: Tensor, batch: Tokens) -> Tensor:
    """Losses [sample, position] of a batch, 0 where a token does not count."""
    return losses if isinstance(batch, Tensor) else torch.where(batch["counted"], losses, 0.0)


def token_ids(batch: Tokens) -> Tensor:
    """[sample, position]."""
    return batch if isinstance(batch, Tensor) else batch["tokens"]


def pass_arguments(batch: Tokens) -> dict[str, Tensor]:
    """What a pass needs besides the tokens: the positions in their documents, of packed rows."""
    if isinstance(batch, Tensor) or "position_ids" not in batch:
        return {}
    return {"position_ids": batch["position_ids"][:, :-1]}


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of every predicted token, l(x, y) = -log p(y | x) in nats.

    Args:
        logits: [batch, position, vocabulary] for the inputs ``tokens[:, :-1]``; any dtype. They are widened to float32
            first, since bfloat16 losses near 3.0 are 0.016 apart.
        tokens: [batch, position + 1] token ids.

    Returns:
        [batch, position] float32; column p is the loss of ``tokens[:, p + 1]``.

    Examples:
        >>> logits, tokens = torch.zeros(1, 2, 4), torch.tensor([[0, 1, 2]])
        >>> token_losses(logits, tokens)  # log 4 nats: nothing is known of four tokens
        tensor([[1.3863, 1.3863]])
    """
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].reshape(-1)).view(tokens.shape[0], -1)


def fits_a_chunk(num_positions: int, vocabulary_size: int) -> bool:
    """Whether the logits of so many positions may be there at once."""
    return num_positions * vocabulary_size <= CHUNK


def head_losses(head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, vocabulary_size: int) -> Tensor:
    """Cross-entropy of ``head(states)`` in nats, with logits of at most ``CHUNK`` numbers at a time.

    In the backward pass the logits of a chunk are computed again: no [batch, position, vocabulary] is ever there.

    Args:
        head: [position, width] -> logits [position, vocabulary].
        states: [batch, position, width], what enters the head.
        targets: [batch, position] token ids.
        vocabulary_size: number of logits of a position.

    Returns:
        [batch, position] float32.
    """

    def losses(part: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(head(part), wanted)

    size = max(1, CHUNK // vocabulary_size)
    chunks = zip(states.flatten(0, 1).split(size), targets.reshape(-1).split(size), strict=True)
    if torch.is_grad_enabled():
        kept = partial(checkpoint, losses, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([kept(*chunk) for chunk in chunks]).view(targets.shape)
    return torch.cat([losses(*chunk) for chunk in chunks]).view(targets.shape)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats [position] of logits [position, vocabulary], in float32."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
