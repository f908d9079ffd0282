"""The weighted training loss."""

from __future__ import annotations

from torch import Tensor


def weighted_loss(losses: Tensor, weights: Tensor, expected_weight: float, num_ranks: int) -> Tensor:
    """This rank's share of  sum_i rho_i l_i / (rho_mean m) , over the m losses of the *global* batch that count.

    rho_mean is the mean of the whole table, so that over batches the expectation is L_rho = sum_i rho_i l_i / sum_i
    rho_i, which chains are on and predictions are of. Divided by the sum of rho over the batch instead, a weight that a
    whole batch shares would cancel: of rho_i that is constant over sequences .5 to .8 would be left at batches of 2 to
    8 sequences.

    Data-parallel engines average gradients over ranks, so the share is scaled by the number of ranks: the average over
    ranks is then the gradient of the global loss. A mean of rank means would give every rank the same say, however few
    losses count among its samples.

    Args:
        losses: l_i of this rank's tokens [sequence, position], nats.
        weights: rho_i of the same tokens.
        expected_weight: rho_mean m.
        num_ranks: data-parallel ranks.
    """
    return (weights * losses).sum() * (num_ranks / expected_weight)
