"""The weighted training loss."""

from __future__ import annotations

from torch import Tensor


def weighted_loss(losses: Tensor, weights: Tensor, global_weight: float, num_ranks: int) -> Tensor:
    """This rank's share of  sum_i rho_i l_i / sum_i rho_i , both sums over the *global* batch.

    Data-parallel engines average gradients over ranks, so the share is scaled by the number of ranks: the average over
    ranks is then the gradient of the global ratio. A mean of rank means would give every rank the same say, however
    little weight its samples carry.

    Args:
        losses: l_i of this rank's tokens [sequence, position], nats.
        weights: rho_i of the same tokens.
        global_weight: sum of rho over the whole global batch.
        num_ranks: data-parallel ranks.
    """
    return (weights * losses).sum() * (num_ranks / global_weight)
