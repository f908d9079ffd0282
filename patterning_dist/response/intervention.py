"""The inverse of chi: which directions of response are asked for.

chi is [observable, sample]; dmu = (n_beta / n) chi h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from patterning_dist.errors import PatterningError
from patterning_dist.response.columns import Chi, Columns
from patterning_dist.response.moments import Floats

Method = Literal["minimum_norm", "ridge", "truncated", "mode"]
DEPENDENT = 1e-10  # rows of chi are linearly dependent if their correlations have an eigenvalue below this
INCONSISTENT = 1e-6  # relative part of a target along dependent rows that is more than rounding


@dataclass(frozen=True)
class Inverse:
    """How chi is inverted; without bounds h = (n / n_beta) chi^T (chi chi^T + tau I)^-1 target, arXiv 2601.13548.

    `minimum_norm`: tau = 0, and the response is the target exactly. `ridge`: tau = `ridge`, in units of chi chi^T.
    `truncated`: the pseudo-inverse on the `rank` leading singular directions. `mode`: that singular direction alone.
    """

    method: Method = "minimum_norm"
    ridge: float | None = None
    rank: int | None = None
    mode: int | None = None

    def __post_init__(self) -> None:
        options = {"ridge": self.ridge, "truncated": self.rank, "mode": self.mode}
        if self.method not in ("minimum_norm", *options):
            raise PatterningError(f"method: got {self.method!r}, expected minimum_norm, ridge, truncated or mode")
        given = [name for name, value in options.items() if value is not None]
        if given != ([] if self.method == "minimum_norm" else [self.method]):
            raise PatterningError(
                f"method {self.method!r}: expected its own option only; ridge takes ridge, "
                "truncated takes rank, mode takes mode, minimum_norm takes none"
            )
        if self.ridge is not None and not self.ridge > 0:
            raise PatterningError(f"ridge: got {self.ridge}, expected a number above 0")

    def directions(
        self, gram: Floats, target: Floats, observables: Sequence[str] | None = None
    ) -> tuple[Floats, Floats]:
        """Rows v, orthogonal in `gram`, and v gram v^T: the directions in which a response is asked for."""
        size = np.sqrt(np.diag(gram))
        if not size.any():
            raise PatterningError("chi: no row varies over samples, so no weights change the response")
        if self.method == "minimum_norm":
            return _independent_directions(gram, size, target, observables)
        for name, value, low, high in (
            ("rank", self.rank, 1, len(gram)),
            ("mode", self.mode, 0, len(gram) - 1),
        ):
            if value is not None and not low <= value <= high:
                raise PatterningError(f"{name}: got {value}, expected {low} to {high}")
        squares, vectors = np.linalg.eigh(gram)
        squares, rows = squares[::-1], vectors[:, ::-1].T
        keep = squares > 1e-13 * squares[0]
        if self.rank is not None:
            keep &= np.arange(len(keep)) < self.rank
        if self.mode is not None:
            keep &= np.arange(len(keep)) == self.mode
        if not keep.any():
            raise PatterningError(f"mode {self.mode}: its singular value is zero; choose a stronger mode")
        return rows[keep], squares[keep]


def _independent_directions(
    gram: Floats, size: Floats, target: Floats, observables: Sequence[str] | None
) -> tuple[Floats, Floats]:
    # Correlations, so that what counts as dependent does not hang on the observables' units.
    scale = np.where(size > 0, size, 1.0)
    squares, vectors = np.linalg.eigh(gram / np.outer(scale, scale))
    rows, wanted = vectors.T, target / scale
    null = squares <= DEPENDENT
    miss = np.abs(rows[null] @ wanted)
    if null.any() and miss.max() > INCONSISTENT * np.abs(wanted).max():
        names = observables or [f"row {index}" for index in range(len(target))]
        involved = np.abs(rows[null][np.argmax(miss)]) > 1e-4
        listed = ", ".join(name for name, is_in in zip(names, involved, strict=True) if is_in)
        raise PatterningError(
            f"observables {listed}: their chi rows are linearly dependent (or zero) and the target "
            "contradicts that; drop one of them, change the target or use method 'ridge' or 'truncated'"
        )
    return rows[~null] / scale[None], squares[~null]


def check_inputs(chi: Chi, target: ArrayLike, inverse_temperature: float) -> tuple[Columns, Floats]:
    """The columns and a float64 target; PatterningError for unlike shapes and a temperature that is none."""
    columns, target = Columns(chi), np.asarray(target, np.float64)
    if target.shape != (columns.num_rows,) or not np.isfinite(target).all():
        raise PatterningError(
            f"target: got {target.tolist()}, expected {columns.num_rows} finite numbers, one for each observable"
        )
    if not 0 < inverse_temperature < np.inf:
        raise PatterningError(f"inverse_temperature: got {inverse_temperature}, expected a number above 0")
    return columns, target
