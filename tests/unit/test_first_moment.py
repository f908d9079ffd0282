"""First moments of losses around a checkpoint against their closed form, and scores of splits and ablations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from language_targets import language_task
from torch import nn

from patterning_dist.errors import PatterningError
from patterning_dist.models.components import select_component
from patterning_dist.sampling.first_moment import antithetic_pair, mean_rises
from patterning_dist.sampling.target import Target
from patterning_dist.stages.controls import split_scores

DIMENSION, NUM_SAMPLES, GAMMA = 6, 5, 3.7
RNG = np.random.default_rng(4)
SLOPES = torch.tensor(RNG.normal(size=(NUM_SAMPLES, DIMENSION)), dtype=torch.float32)
ROOTS = torch.tensor(RNG.normal(size=(NUM_SAMPLES, DIMENSION, DIMENSION)), dtype=torch.float32)
CURVATURES = ROOTS @ ROOTS.mT
CENTER = torch.tensor(RNG.normal(size=DIMENSION), dtype=torch.float32)


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(CENTER.clone())
        self.fixed = nn.Parameter(torch.ones(2))


def quadratic_target(curved: float = 1.0, **options) -> Target:
    """l_i = a_i . w + c/2 w . H_i w"""

    def losses(model: Quadratic, ids: torch.Tensor) -> torch.Tensor:
        w = model.w
        return SLOPES[ids] @ w + curved / 2 * torch.einsum("ijk,j,k->i", CURVATURES[ids], w, w) + model.fixed.sum()

    model, ids = Quadratic(), torch.arange(NUM_SAMPLES)
    return Target(model, select_component(model, "w"), losses, ids, ids, **options)


def antithetic_rises(target: Target, pairs, seed: int = 5, gamma: float = GAMMA) -> torch.Tensor:
    return mean_rises(target, target.probe, [antithetic_pair(target, n, seed=seed, gamma=gamma) for n in pairs])


def test_the_mean_over_pairs_is_the_trace_of_the_curvature():
    target = quadratic_target()
    rises = antithetic_rises(target, range(3000)).numpy()
    wanted = np.trace(CURVATURES.numpy(), axis1=1, axis2=2) / (2 * GAMMA)
    error = rises.std(axis=0, ddof=1) / np.sqrt(len(rises))
    assert (np.abs(rises.mean(axis=0) - wanted) < 4 * error).all()
    # u . H u / 2 gamma has the variance |H|^2 / 2 gamma^2; that of a sample's variance is about 2 / n of it.
    spread = np.linalg.norm(CURVATURES.numpy(), axis=(1, 2)) / (2**0.5 * GAMMA)
    np.testing.assert_allclose(rises.std(axis=0), spread, rtol=0.25)
    torch.testing.assert_close(target.live()["w"], CENTER)  # left where it was


def test_the_two_signs_cancel_what_is_linear():
    target = quadratic_target(curved=0.0)
    rises = antithetic_rises(target, range(4), gamma=0.01)
    assert rises.abs().max() < 1e-5 * SLOPES.abs().max() / 0.01**0.5


def test_a_pair_is_the_same_whatever_is_drawn_beside_it():
    whole = quadratic_target()
    cut = quadratic_target(micro_batch_size=2)
    rises = antithetic_rises(whole, range(4))
    torch.testing.assert_close(antithetic_rises(cut, [3])[0], rises[3], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(antithetic_rises(whole, [3], seed=6)[0], rises[3])


def test_draws_of_a_chain_are_averaged_each_from_the_checkpoint():
    target = quadratic_target()
    positions = [{"w": CENTER + step} for step in (0.5, -0.1, 2.0)]
    rises = mean_rises(target, target.probe, [iter(positions), positions[:1]])
    singly = torch.cat([mean_rises(target, target.probe, [[position]]) for position in positions])
    torch.testing.assert_close(rises, torch.stack([singly.mean(dim=0), singly[0]]))


def test_an_ablation_sets_the_component_to_zero():
    target = quadratic_target()
    wanted = -(SLOPES @ CENTER + torch.einsum("ijk,j,k->i", CURVATURES, CENTER, CENTER) / 2)
    torch.testing.assert_close(
        mean_rises(target, target.probe, [[{"w": torch.zeros(DIMENSION)}]])[0].float(), wanted, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(target.live()["w"], CENTER)


def tokens_of_two_domains():
    tokens = np.tile(np.random.default_rng(1).integers(1, 31, size=(12, 6)), 2)
    return language_task(tokens, tokens, domains=np.array(["a", "b"] * 6, dtype=object))


def test_scores_of_a_split_are_its_coefficients():
    task = tokens_of_two_domains()
    ids = np.arange(len(task.train))
    sample, position = (part.ravel() for part in np.indices((len(ids), task.num_positions)))
    index = {task.key: sample, "position": position + 1}
    [(_, mask)] = task.split("induction", task.train, ids)
    row = split_scores(task, index, "induction")
    np.testing.assert_array_equal(row > 0, mask.ravel())
    assert 0 < mask.mean() < 1
    with pytest.raises(PatterningError, match="no split 'other'"):
        split_scores(task, index, "other")
