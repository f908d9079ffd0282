"""The error of a contrast covers what another choice of held-out samples, or of documents, would give."""

from __future__ import annotations

import numpy as np
import pytest

from patterning_dist.response.contrast import split_contrast

REPEATS, TRUTH = 600, 0.3
Z = 1.959964


def draw(rng, num_documents, per_document, spread):
    """Differences [1, sample, sign] of a gap between two kinds of tokens whose numbers vary, and their coefficients."""
    groups = np.repeat(np.arange(num_documents), per_document)
    num = len(groups)
    kinds = rng.integers(3, 20, (num, 2))  # tokens of either kind in a sample
    effect = spread * rng.normal(size=num_documents)[groups]
    # Deviations go with the numbers: that is what an error that takes the denominators as fixed would miss.
    means = np.stack([TRUTH + 0.1 + effect, 0.1 + 0 * effect], axis=1) + 0.2 * rng.normal(size=(num, 2))
    shares = kinds / kinds.sum(axis=0) * [1, -1]
    return (means * shares)[None], shares[None], groups


@pytest.mark.parametrize(("num_documents", "per_document", "spread"), [(60, 1, 0.0), (40, 6, 0.3)])
def test_intervals_cover(num_documents, per_document, spread):
    rng = np.random.default_rng(0)
    found = [split_contrast(*draw(rng, num_documents, per_document, spread)) for _ in range(REPEATS)]
    values, errors = np.array([f.value[0] for f in found]), np.array([f.standard_error[0] for f in found])
    covered = np.mean(np.abs(values - TRUTH) < Z * errors)
    slack = 3 * np.sqrt(0.95 * 0.05 / REPEATS)
    assert 0.95 - 0.02 - slack < covered < 0.99 + slack  # 40 documents: t against normal costs a little
    assert errors.mean() == pytest.approx(values.std(), rel=0.15)


def test_samples_of_a_document_are_not_independent():
    difference, shares, groups = draw(np.random.default_rng(1), 40, 6, 0.3)
    together, alone = split_contrast(difference, shares, groups), split_contrast(difference, shares, np.arange(240))
    assert together.standard_error[0] > 1.4 * alone.standard_error[0]
    assert together.value == pytest.approx(difference.sum(), rel=1e-12) and alone.value == together.value


def test_a_shift_of_all_losses_is_no_error():
    """A constant on every token moves the mean, not its error: a fixed total would call it noise."""
    _, shares, groups = draw(np.random.default_rng(2), 30, 2, 0.0)
    shifted = split_contrast(0.7 * shares, shares, groups)
    assert shifted.standard_error[0] < 1e-12
    one = shares[:, :, :1] / shares[:, :, :1].sum()
    assert split_contrast(0.7 * one, one, groups).value[0] == pytest.approx(0.7)


def test_one_sample_has_no_error():
    assert np.isnan(split_contrast(np.ones((1, 1, 2)), np.ones((1, 1, 2)), np.zeros(1)).standard_error[0])
