"""Modes of the susceptibility matrix over components: its singular value decomposition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from patterning_dist.errors import PatterningError
from patterning_dist.response.moments import Floats


@dataclass(frozen=True)
class Modes:
    """matrix = left @ diag(singular_values) @ right, strongest mode first."""

    left: Floats  # component mode
    singular_values: Floats  # mode
    right: Floats  # mode token
    explained_variance: Floats  # mode: share of the sum of squares


def susceptibility_modes(chi: ArrayLike, *, rows: Literal["centered", "standardized"] = "centered") -> Modes:
    """Singular value decomposition of chi [component, token], Baker et al. 2504.18274.

    Rows are centred over tokens, or also divided by their standard deviation: do so where components cannot
    be compared in size (baseline `full`, observables of different units). A row without spread stays zero. The sign
    of a mode is that its largest |left| entry is positive (the first of equals).
    Raises PatterningError if chi is not a finite matrix of rank >= 1 after centring.

    Examples:
        >>> from patterning_dist import susceptibility_modes
        >>> modes = susceptibility_modes([[2.0, -2.0, 0.0], [1.0, -1.0, 0.0]])  # two heads, three tokens
        >>> modes.explained_variance.round(3), modes.left[:, 0].round(2)  # one mode, two parts to one
        (array([1., 0.]), array([0.89, 0.45]))
    """
    matrix = np.asarray(chi, np.float64)
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise PatterningError(f"modes: got shape {matrix.shape}, expected a finite matrix [component, token]")
    left, values, right = np.linalg.svd(_rescaled(matrix, rows), full_matrices=False)
    if not values[0]:
        raise PatterningError("modes: chi does not vary over tokens; expected at least one component that responds")
    signs = _leading_signs(left)
    return Modes(left * signs, values, right * signs[:, None], values**2 / np.sum(values**2))


def _leading_signs(left: Floats) -> Floats:
    """+-1 for each column, so that its largest entry in absolute value becomes positive. [mode]"""
    size = np.abs(left)
    # Entries that are equal up to rounding count as equal, else the sign would hang on the last bit.
    first = np.argmax(size >= (1 - 1e-9) * size.max(axis=0), axis=0)
    return np.where(left[first, np.arange(left.shape[1])] < 0, -1.0, 1.0)


def _rescaled(matrix: Floats, how: str) -> Floats:
    if how not in ("centered", "standardized"):
        raise PatterningError(f"modes: got {how!r}, expected 'centered' or 'standardized'")
    centered = matrix - matrix.mean(axis=1, keepdims=True)
    if how == "centered":
        return centered
    spread = centered.std(axis=1, keepdims=True)
    negligible = spread <= 1e-12 * np.abs(matrix).max(axis=1, keepdims=True)
    return np.where(negligible, 0.0, centered / np.where(negligible, 1.0, spread))
