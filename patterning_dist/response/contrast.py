"""Difference of a split loss between two models on the same held-out samples, with its sampling error."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Contrast(NamedTuple):
    """A difference [observable] and its standard error over held-out samples [observable]."""

    value: np.ndarray
    standard_error: np.ndarray


def split_contrast(difference: np.ndarray, shares: np.ndarray, groups: np.ndarray) -> Contrast:
    """sum_i d_i over samples, and its error as that of a difference of ratios.

    A split loss is a signed sum of means over masks of entries, m_s = sum_i d_is / sum_i a_is, s the sign. To first
    order in the samples' deviations (Taylor linearisation; Cochran, *Sampling Techniques*, 1977, ch. 6)

        r_i = sum_s d_is - m_s a_is ,     se^2 = G / (G - 1) sum_g (sum_{i in g} r_i)^2

    over samples, and over groups of samples that are not independent; the larger of the two is reported.

    Args:
        difference: what each sample adds, entries with coefficients above and below 0 apart [observable, sample, sign].
        shares: sums of those coefficients, likewise.
        groups: of the samples, such as their documents [sample].
    """
    value, mass = difference.sum(axis=(1, 2)), shares.sum(axis=1, keepdims=True)
    means = difference.sum(axis=1, keepdims=True) / np.where(mass == 0, 1, mass)
    residual = (difference - means * shares).sum(axis=2)
    _, group = np.unique(groups, return_inverse=True)
    together = np.stack([np.bincount(group, row) for row in residual])
    taking_part = np.stack([np.bincount(group, row) > 0 for row in np.abs(shares).sum(axis=2)])
    alone = np.abs(shares).sum(axis=2) > 0
    return Contrast(value, np.maximum(_error(residual, alone), _error(together, taking_part)))


def _error(residual: np.ndarray, taking_part: np.ndarray) -> np.ndarray:
    number = taking_part.sum(axis=1)
    squares = (residual**2).sum(axis=1)
    return np.where(number > 1, np.sqrt(squares * number / np.maximum(number - 1, 1)), np.nan)
