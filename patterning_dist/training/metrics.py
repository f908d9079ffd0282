"""What is measured of a language model while it learns an induction circuit.

previous-token score   mean attention from position i to i - 1
prefix-matching score  on repeated random tokens r r: mean attention from position i of the second copy to the token
                       that followed the same token in the first copy (Olsson et al., "In-context Learning and
                       Induction Heads", 2022)
repeated_gap           mean loss on the second copy minus mean loss on the first, nats
induction_gap          mean loss on induction tokens (they complete a bigram seen earlier in the block) minus the rest,
                       nats
in_context_gap         mean loss on the last quarter of the context minus mean loss on the second eighth, nats
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patterning_dist.data.induction import induction_tokens, repeated_sequences
from patterning_dist.models.attention import AttentionOnlyTransformer
from patterning_dist.models.losses import token_losses


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out tokens [sequence, position] with their induction mask, and repeated random tokens."""

    tokens: Tensor
    induction: Tensor
    repeated: Tensor

    @classmethod
    def build(cls, tokens: np.ndarray, vocabulary_size: int, num_repeated: int = 32) -> EvaluationSet:
        """Make the set from validation blocks; the repeated sequences are always the same ones (seed 0)."""
        repeated = repeated_sequences(0, num_repeated, tokens.shape[1], vocabulary_size)
        return cls(
            torch.from_numpy(tokens),
            torch.from_numpy(induction_tokens(tokens)),
            torch.from_numpy(repeated),
        )


def batched_losses(model: torch.nn.Module, tokens: Tensor, batch_size: int = 16) -> Tensor:
    """Per-token losses [sequence, position] in nats, without gradients, ``batch_size`` sequences at a time."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat(
            [token_losses(model(b[:, :-1]), b).cpu() for b in (c.to(device) for c in tokens.split(batch_size))]
        )


def evaluate(model: AttentionOnlyTransformer, evaluation: EvaluationSet) -> dict[str, float]:
    """All metrics of the module docstring; losses in nats, scores are probabilities."""
    losses = batched_losses(model, evaluation.tokens)
    num_positions = losses.shape[1]
    induction = losses[evaluation.induction].mean().item()
    rest = losses[~evaluation.induction].mean().item()
    repeated = batched_losses(model, evaluation.repeated)
    half = evaluation.repeated.shape[1] // 2
    late, early = losses[:, -(num_positions // 4) :], losses[:, num_positions // 8 : num_positions // 4]
    return {
        "validation_loss": losses.mean().item(),
        "induction_loss": induction,
        "rest_loss": rest,
        "induction_gap": induction - rest,
        # Column p predicts token p + 1; the first token of the second copy cannot be foreseen.
        "repeated_gap": (repeated[:, half:].mean() - repeated[:, : half - 1].mean()).item(),
        "in_context_gap": (late.mean() - early.mean()).item(),
        **attention_scores(model, evaluation.repeated),
    }


def attention_scores(model: AttentionOnlyTransformer, repeated: Tensor) -> dict[str, float]:
    """Previous-token and prefix-matching score of every head, and the largest prefix-matching score of all."""
    device = next(model.parameters()).device
    inputs = repeated[:, :-1].to(device)
    half = repeated.shape[1] // 2
    query = torch.arange(half, inputs.shape[1], device=device)
    everywhere = torch.arange(1, inputs.shape[1], device=device)
    scores: dict[str, float] = {}
    with torch.no_grad():
        patterns = model.attention_patterns(inputs)
    for layer, pattern in enumerate(patterns):
        previous = pattern[:, :, everywhere, everywhere - 1].mean(dim=(0, 2)).tolist()
        prefix = pattern[:, :, query, query - half + 1].mean(dim=(0, 2)).tolist()
        for head, (a, b) in enumerate(zip(previous, prefix, strict=True)):
            scores[f"previous_token_{layer}_{head}"] = a
            scores[f"prefix_matching_{layer}_{head}"] = b
    scores["prefix_matching"] = max(v for k, v in scores.items() if k.startswith("prefix_matching_"))
    return scores
