"""Minibatches are a pure function of (seed, stream, step), and uniform."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare

from patterning_dist.data.sampler import distinct_minibatch, epoch_batch, minibatch, permutation


def test_minibatch_is_stable_across_machines_and_releases() -> None:
    """Pinned: a change here changes every chain ever sampled."""
    assert minibatch(seed=7, stream=3, step=5, batch_size=6, population=1000).tolist() == PINNED


PINNED = [428, 890, 78, 642, 24, 860]


def test_any_step_can_be_addressed_in_any_order() -> None:
    forward = [minibatch(1, 2, step, 8, 100) for step in range(20)]
    for step in reversed(range(20)):
        np.testing.assert_array_equal(minibatch(1, 2, step, 8, 100), forward[step])
    # A larger batch begins with the smaller one.
    np.testing.assert_array_equal(minibatch(1, 2, 4, 32, 100)[:8], forward[4])


@pytest.mark.parametrize("other", [(1, 2, 4), (1, 3, 3), (2, 2, 3), (2, 1, 3)])
def test_streams_steps_and_seeds_differ(other: tuple[int, int, int]) -> None:
    first, second = minibatch(1, 2, 3, 1000, 10**6), minibatch(*other, 1000, 10**6)
    assert np.mean(first == second) < 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.12


def test_minibatches_are_uniform() -> None:
    ids = np.concatenate([minibatch(0, 0, step, 16, 37) for step in range(2000)])
    assert ids.dtype == np.int64
    assert chisquare(np.bincount(ids, minlength=37)).pvalue > 0.01
    pairs = ids[:-1] * 37 + ids[1:]
    assert chisquare(np.bincount(pairs, minlength=37 * 37)).pvalue > 0.01


def test_distinct_minibatches_are_the_first_ids_that_differ() -> None:
    assert distinct_minibatch(7, 3, 5, 6, 1000).tolist() == PINNED
    for step in range(200):
        ids, stream = distinct_minibatch(1, 2, step, 6, 9), minibatch(1, 2, step, 400, 9)
        assert ids.dtype == np.int64
        assert ids.tolist() == list(dict.fromkeys(stream.tolist()))[:6]


def test_all_choices_of_distinct_ids_are_equally_likely() -> None:
    sets = ["".join(map(str, sorted(distinct_minibatch(0, 1, step, 3, 6)))) for step in range(8000)]
    counts = np.unique(sets, return_counts=True)[1]
    assert len(counts) == 20
    assert chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize("batch_size", [5, 8])
def test_a_batch_of_everything_is_everything(batch_size: int) -> None:
    assert distinct_minibatch(3, 1, 4, batch_size, 5).tolist() == [0, 1, 2, 3, 4]
    assert sorted(distinct_minibatch(3, 1, 4, 4, 5)) != [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("batch_size", "population"), [(4, 12), (5, 12), (30, 12)])
def test_every_epoch_covers_everything_once(batch_size: int, population: int) -> None:
    stream = np.concatenate([epoch_batch(9, step, batch_size, population) for step in range(60)])
    epochs = [stream[start : start + population] for start in range(0, len(stream) - population + 1, population)]
    assert len(epochs) >= 20
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(population))
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    np.testing.assert_array_equal(epoch_batch(9, 17, batch_size, population), stream[17 * batch_size :][:batch_size])


def test_permutations_are_uniform() -> None:
    ranks = [tuple(permutation(0, stream, 4)) for stream in range(4800)]
    _, counts = np.unique(ranks, axis=0, return_counts=True)
    assert len(counts) == 24
    assert chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize("draw", [minibatch, distinct_minibatch, lambda *a: epoch_batch(0, *a[2:])])
def test_empty_population_is_refused(draw) -> None:
    with pytest.raises(ValueError, match="population is 0; expected at least 1"):
        draw(0, 0, 0, 4, 0)
