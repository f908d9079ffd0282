"""Averaged over ranks, the weighted loss is the global sum over what it is divided by, in value and in gradient."""

from __future__ import annotations

import pytest
import torch

from patterning_dist.training.batches import weighted_loss


def problem():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 4, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(6, 4, generator=generator, dtype=torch.float64)
    weights[3:] *= 9  # the second rank carries most of the weight
    weights[1] = 0
    return features, weights, torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)


def losses(features, w):
    return (features @ w).square() + (features @ w).sin()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_mean_over_ranks_is_the_global_ratio(num_ranks):
    features, weights, w = problem()
    expected_weight = 0.7 * weights.numel()  # as a table has it whose mean weight is .7
    ratio = (weights * losses(features, w)).sum() / expected_weight
    (wanted,) = torch.autograd.grad(ratio, w)
    shares = [
        weighted_loss(losses(f, w), rho, expected_weight, num_ranks)
        for f, rho in zip(features.chunk(num_ranks), weights.chunk(num_ranks), strict=True)
    ]
    mean = sum(shares) / num_ranks
    assert mean.item() == pytest.approx(ratio.item(), rel=1e-12)
    gradients = [torch.autograd.grad(share, w)[0] for share in shares]
    torch.testing.assert_close(sum(gradients) / num_ranks, wanted, rtol=1e-12, atol=1e-12)


def test_it_is_not_the_mean_of_rank_means():
    features, weights, w = problem()
    (wanted,) = torch.autograd.grad((weights * losses(features, w)).sum() / weights.sum(), w)
    means = [(r * losses(f, w)).sum() / r.sum() for f, r in zip(features.chunk(2), weights.chunk(2), strict=True)]
    (other,) = torch.autograd.grad(sum(means) / 2, w)
    assert (other - wanted).abs().max() > 0.1


def test_weights_of_one_give_the_plain_mean():
    features, weights, w = problem()
    share = weighted_loss(losses(features, w), torch.ones_like(weights), float(weights.numel()), 1)
    assert share.item() == pytest.approx(losses(features, w).mean().item(), rel=1e-12)
