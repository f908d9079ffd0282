"""Modes rebuild the matrix they come from, with signs and shares that do not depend on luck."""

from __future__ import annotations

import numpy as np
import pytest

from patterning_dist.errors import PatterningError
from patterning_dist.response.modes import susceptibility_modes


def matrix(seed=0):
    return np.random.default_rng(seed).normal(size=(4, 50)) * np.array([[1], [10], [0.1], [2]]) + 3


def test_modes_rebuild_the_centred_matrix():
    chi = matrix()
    modes = susceptibility_modes(chi)
    rebuilt = modes.left @ np.diag(modes.singular_values) @ modes.right
    np.testing.assert_allclose(rebuilt, chi - chi.mean(axis=1, keepdims=True), atol=1e-12)
    np.testing.assert_allclose(modes.left.T @ modes.left, np.eye(4), atol=1e-12)
    assert modes.explained_variance.sum() == pytest.approx(1)
    assert (np.diff(modes.singular_values) <= 0).all()


def test_standardised_rows_do_not_see_units():
    chi = matrix()
    a = susceptibility_modes(chi, rows="standardized")
    b = susceptibility_modes(chi * np.array([[1e6], [1], [1e-6], [3]]) - 7, rows="standardized")
    np.testing.assert_allclose(a.singular_values, b.singular_values, rtol=1e-8)
    np.testing.assert_allclose(a.left, b.left, atol=1e-7)
    assert np.sum(a.singular_values**2) == pytest.approx(chi.size)


def test_sign_is_positive_at_the_largest_entry_even_in_a_tie():
    for seed in range(20):
        modes = susceptibility_modes(matrix(seed))
        largest = np.argmax(np.abs(modes.left), axis=0)
        assert (modes.left[largest, range(4)] > 0).all()
    chi = np.outer([1.0, -1.0], np.sin(np.arange(20.0)))
    for noise in (0.0, 1e-14, -1e-14):
        assert susceptibility_modes(chi + np.array([[noise], [0]]) * chi).left[0, 0] > 0
        assert susceptibility_modes(-chi).left[0, 0] > 0


def test_a_silent_component_stays_zero_and_silence_is_an_error():
    chi = matrix()
    chi[2] = 0.1
    modes = susceptibility_modes(chi, rows="standardized")
    np.testing.assert_allclose(modes.left[2, :3], 0, atol=1e-12)
    with pytest.raises(PatterningError, match="does not vary over tokens"):
        susceptibility_modes(np.ones((2, 5)))
    with pytest.raises(PatterningError, match="expected a finite matrix"):
        susceptibility_modes(np.full((2, 5), np.nan))
    with pytest.raises(PatterningError, match="got 'raw', expected 'centered' or 'standardized'"):
        susceptibility_modes(chi, rows="raw")
