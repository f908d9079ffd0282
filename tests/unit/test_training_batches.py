"""Which samples a step sees and what they weigh: weights on losses, by drawing, in phases, without what is masked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from patterning_dist.config import TrainingConfig
from patterning_dist.data.weights import write_sample_weights
from patterning_dist.errors import PatterningError
from patterning_dist.training.batches import WeightedBatches, weighted_loss
from patterning_dist.training.job import TrainingJob

TRAINING = TrainingConfig(num_steps=1, batch_size=64, anneal_batch_size=32)
NUM_SAMPLES = 40


class Numbered:
    """As much of a task as batches need."""

    def __init__(self, num_positions=None, mask=None, key="sample_id"):
        self.train, self.num_positions, self.mask, self.key = range(NUM_SAMPLES), num_positions, mask, key

    def counted(self, samples, ids):
        return None if self.mask is None else self.mask[ids]


def make_job(**changes):
    return TrainingJob(**{"name": "arm", "folder": Path(), "inputs": [], "seed": 5, "num_steps": 100} | changes)


@pytest.fixture
def table(tmp_path):
    """Sample i weighs i / 20, the last one has no row."""
    write_sample_weights(tmp_path / "w.parquet", np.arange(39), None, np.arange(39) / 20, {}, key="sample_id")
    return tmp_path / "w.parquet"


def rho():
    return np.append(np.arange(39) / 20, 1).astype(np.float32)


def test_weights_on_losses_leave_the_order_of_the_data(table):
    plain, weighted = (WeightedBatches(make_job(weights=w), TRAINING, Numbered()) for w in (None, table))
    for step in (0, 1, 57):
        (ids, ones, number), (same, weights, expected) = plain(step), weighted(step)
        np.testing.assert_array_equal(ids, same)
        np.testing.assert_array_equal(weights, rho()[ids])
        assert (number, expected) == (64, pytest.approx(64 * rho().mean(), rel=1e-6))
        assert ones.dtype == weights.dtype == np.float32
        assert (ones == 1).all()
    assert (weighted.num_joined, weighted.num_missing) == (39, 1)
    assert (plain.num_joined, plain.num_missing) == (0, 0)
    epochs = np.concatenate([plain(step)[0] for step in range(5)])  # 5 * 64 = 8 passes
    assert (np.bincount(epochs, minlength=NUM_SAMPLES) == 8).all()


def test_a_sample_is_drawn_in_proportion_to_its_weight(table):
    batches = WeightedBatches(make_job(weights=table, weighting="draw", num_steps=1000), TRAINING, Numbered())
    drawn, weights, expected = zip(*(batches(step) for step in range(400)), strict=True)
    assert (np.concatenate(weights) == 1).all()
    assert set(expected) == {64}
    counts, number = np.bincount(np.concatenate(drawn), minlength=NUM_SAMPLES), 400 * 64
    expected = rho() / rho().sum() * number
    assert counts[0] == 0
    # Independent draws: each count is binomial, of variance below its mean.
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected.max())
    assert (np.abs(counts - expected)[1:] / np.sqrt(expected[1:])).max() < 5
    # Without weights all are drawn alike, and not in passes.
    alike = WeightedBatches(make_job(weighting="draw"), TRAINING, Numbered())
    counts = np.bincount(np.concatenate([alike(step)[0] for step in range(90)]), minlength=NUM_SAMPLES)
    assert counts.min() > 0
    assert len(set(counts)) > 5


@pytest.mark.parametrize("weighting", ["loss", "draw"])
def test_after_the_weighted_share_the_training_is_plain(table, weighting):
    settings = {"weighting": weighting, "weighted_share": 0.3, "num_steps": 10}
    part, plain, whole = (
        WeightedBatches(make_job(**settings | changes), TRAINING, Numbered())
        for changes in ({"weights": table}, {"weights": None}, {"weights": table, "weighted_share": 1.0})
    )
    for step in range(10):
        for found, expected in zip(part(step), (whole if step < 3 else plain)(step), strict=True):
            np.testing.assert_array_equal(found, expected)
    differs = [not all(map(np.array_equal, part(step), plain(step))) for step in range(10)]
    assert differs == [True] * 3 + [False] * 7


def test_the_strength_of_an_arm_stretches_its_table(tmp_path):
    path = tmp_path / "w.parquet"
    write_sample_weights(path, np.array([3]), None, np.array([1.5]), {}, key="sample_id")
    weights = WeightedBatches(make_job(weights=path, strength=3.0), TRAINING, Numbered()).weights
    assert weights.tolist() == [2.5 if i == 3 else 1.0 for i in range(NUM_SAMPLES)]


def test_what_does_not_count_weighs_nothing_with_and_without_a_table(table):
    mask = np.random.default_rng(0).random((NUM_SAMPLES, 3)) < 0.6
    task = Numbered(3, mask)
    for path, weight in ((None, np.ones(NUM_SAMPLES, np.float32)), (table, rho())):
        batches = WeightedBatches(make_job(weights=path, weighted_share=0.5), TRAINING, task)
        for step in (0, 99, 100, 101):  # weighted, plain, annealing
            ids, weights, total = batches(step)
            expected = (weight[ids] if step == 0 else np.ones(len(ids)))[:, None] * mask[ids]
            np.testing.assert_array_equal(weights, expected)
            mean = np.broadcast_to(weight[:, None], mask.shape)[mask].mean() if step == 0 else 1
            assert total == pytest.approx(mean * mask[ids].sum(), rel=1e-6)
            assert len(ids) == (64 if step < 100 else 32)
    assert (batches.num_joined, batches.num_missing) == (mask[:39].sum(), mask[39].sum())


def test_annealing_has_an_order_of_its_own():
    batches = WeightedBatches(make_job(num_steps=2, anneal_steps=5), TRAINING, Numbered())
    other = WeightedBatches(make_job(num_steps=2, anneal_steps=5, seed=6), TRAINING, Numbered())
    assert not np.array_equal(batches(2)[0], batches(0)[0][:32])
    assert not np.array_equal(batches(2)[0], other(2)[0])


def test_annealing_is_weighted_where_all_steps_are(table):
    for share, expected in ((1.0, rho()), (0.5, np.ones(NUM_SAMPLES))):
        job = make_job(num_steps=4, anneal_steps=2, weights=table, weighted_share=share)
        ids, weights, _ = WeightedBatches(job, TRAINING, Numbered())(4)
        np.testing.assert_array_equal(weights, expected[ids])


def test_tables_that_cannot_be_trained_on_are_refused(tmp_path):
    path = tmp_path / "w.parquet"
    write_sample_weights(path, np.array([1]), np.array([1]), np.array([2.0]), {})
    task = Numbered(3, key="sequence_id")
    with pytest.raises(PatterningError, match=r"w\.parquet: has a weight for every position, and whole samples are"):
        WeightedBatches(make_job(weights=path, weighting="draw"), TRAINING, task)
    write_sample_weights(path, np.arange(NUM_SAMPLES), None, np.zeros(NUM_SAMPLES), {})
    for weighting in ("draw", "loss"):
        with pytest.raises(PatterningError, match=r"w\.parquet: all weights are 0, so there is nothing to train on"):
            WeightedBatches(make_job(weights=path, weighting=weighting), TRAINING, task)


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_mean_over_batches_is_the_gradient_of_the_weighted_loss(tmp_path, batch_size, num_ranks):
    """h that is constant over sequences arrives whole: chains, predictions and trainings are of the same L_rho.

    Divided by the weight of the batch instead, some of it cancels.
    """
    rng = np.random.default_rng(batch_size)
    slopes, rho = torch.from_numpy(rng.normal(size=(NUM_SAMPLES, 3))), rng.choice([0.2, 2.5], NUM_SAMPLES)
    slopes += 4 * torch.from_numpy(rho)[:, None]  # what is weighted up is alike
    write_sample_weights(tmp_path / "w.parquet", np.arange(NUM_SAMPLES), None, rho, {}, key="sample_id")
    mask = np.zeros((NUM_SAMPLES, 3), bool)
    np.put_along_axis(mask, rng.integers(0, 3, (NUM_SAMPLES, 1)), True, axis=1)  # as many count in every batch
    training = TrainingConfig(num_steps=1, batch_size=batch_size)
    job = make_job(weights=tmp_path / "w.parquet", num_steps=400)
    batches = WeightedBatches(job, training, Numbered(3, mask))
    w = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def gradient(loss):
        return torch.autograd.grad(loss, w)[0].item()

    found, old = [], []
    for step in range(20 * NUM_SAMPLES // batch_size):  # passes without replacement
        ids, weights, expected = batches(step)
        weights = torch.from_numpy(weights).double()
        parts = list(zip(ids.reshape(num_ranks, -1), weights.chunk(num_ranks), strict=True))
        for list_, divisor in ((found, expected), (old, weights.sum().item())):
            shares = [weighted_loss(w * slopes[part], rho_, divisor, num_ranks) for part, rho_ in parts]
            list_.append(sum(map(gradient, shares)) / num_ranks)
    all_weights = torch.from_numpy(rho.astype(np.float32)[:, None] * mask).double()
    full = ((all_weights * slopes).sum() / all_weights.sum()).item()
    assert np.mean(found) == pytest.approx(full, rel=1e-12)
    plain = slopes[torch.from_numpy(mask)].mean().item()
    # E[x / y] of batch means, to second order: full - plain shrinks by Var(y) / E[y]^2 of the batch.
    lost = np.var(rho) / rho.mean() ** 2 / batch_size * (1 - batch_size / NUM_SAMPLES)
    assert (full - np.mean(old)) / (full - plain) > lost / 2


class Named(Numbered):
    """Samples whose labels can be swapped."""

    def swap(self, where, swapped):
        return [-i if other else i for i, other in enumerate(swapped)]


@pytest.mark.parametrize("weighting", ["loss", "draw"])
def test_labels_are_swapped_where_the_table_says_so_as_long_as_it_counts(tmp_path, weighting):
    swapped = np.arange(NUM_SAMPLES) % 3 == 1
    write_sample_weights(
        tmp_path / "w.parquet", np.arange(NUM_SAMPLES), None, np.full(NUM_SAMPLES, 2.0), {}, "sample_id", swapped
    )
    job = make_job(weights=tmp_path / "w.parquet", weighting=weighting, weighted_share=0.5)
    batches, task = WeightedBatches(job, TRAINING, task := Named()), task
    assert batches.samples(0) == batches.samples(49) == task.swap(None, swapped)
    assert batches.samples(50) is task.train
    assert WeightedBatches(make_job(), TRAINING, task).samples(0) is task.train
