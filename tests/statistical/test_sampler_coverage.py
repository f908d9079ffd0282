"""95 % intervals of chi and of the LLC, as the library reports them, cover the posterior's closed form.

Every repetition is a small study of its own: four chains from the checkpoint, burn-in, some hundred draws. All chains
of all repetitions walk side by side, as rows of one position.
"""

from __future__ import annotations

import numpy as np
import pytest
from gaussian_problem import Problem, Walk, comoments

from patterning_dist.response.llc import llc
from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.sampling import rmsprop_sgld, sgld, sgnht

NUM_REPETITIONS, NUM_CHAINS, NUM_DRAWS = 240, 4, 320
DIMENSION, NUM_ROWS = 3, NUM_REPETITIONS * NUM_CHAINS


def study(name):
    """(problem, walk past its burn-in, steps between draws); the bias of every sampler is far below the errors."""
    if name == "sgld":
        problem = Problem(DIMENSION, 23.0, 9.0, 0.02, pull=0.8, seed=11)
        return problem, Walk(problem, sgld, NUM_ROWS, seed=12).advance(2500), 40
    if name == "sgld, minibatches":
        problem = Problem(DIMENSION, 5.0, 17.0, 0.01, pull=0.8, seed=13)
        return problem, Walk(problem, sgld, NUM_ROWS, seed=14, batch_size=4).advance(2500), 40
    if name == "rmsprop_sgld":
        problem = Problem(DIMENSION, 9.0, 14.0, 1.0, pull=5.0, seed=15)
        options = {"step_size": 0.002, "decay": 0.998, "stability": 0.3}
        return problem, Walk(problem, rmsprop_sgld, NUM_ROWS, seed=16, **options).advance(2500), 40
    problem = Problem(DIMENSION, 16.0, 7.0, 0.05, pull=0.8, seed=17)
    options = {"diffusion": 0.15, "num_coordinates": NUM_ROWS * DIMENSION}
    return problem, Walk(problem, sgnht, NUM_ROWS, seed=18, **options).advance(800), 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgld", "sgld, minibatches", "rmsprop_sgld", "sgnht"])
def test_intervals_cover_the_closed_form(name):
    problem, walk, steps_between_draws = study(name)
    losses = walk.record(NUM_DRAWS, steps_between_draws)
    losses = losses.reshape(NUM_REPETITIONS, NUM_CHAINS, NUM_DRAWS, -1)
    exact_chi, exact_llc = problem.chi()[:2], problem.llc()
    covered, covered_llc, scores, scores_llc = [], [], [], []
    for chains in losses:
        got = susceptibility(comoments(chains))
        low, high = got.interval()
        covered.append((low <= exact_chi) & (exact_chi <= high))
        scores.append((got.chi - exact_chi) / got.standard_error)
        coefficient = llc(chains.mean(axis=2), problem.posterior.inverse_temperature)
        low, high = coefficient.interval()
        covered_llc.append(low <= exact_llc <= high)
        scores_llc.append((coefficient.value - exact_llc) / coefficient.standard_error)
    assert 0.90 <= np.mean(covered) <= 0.99
    assert np.mean(covered, axis=0).min() > 0.88
    assert 0.90 <= np.mean(covered_llc) <= 0.99
    # Off by less than half of one study's error on average: coverage is not what hides a bias.
    assert np.abs(np.mean(scores, axis=0)).max() < 0.5
    assert abs(np.mean(scores_llc)) < 0.5
