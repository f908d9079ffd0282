"""Sample weights rho keyed by sample, or by (sample, position): from a solver or the user, joined to a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.errors import PatterningError
from patterning_dist.storage.files import ROWS, parquet_file, read_parquet, write_parquet_parts


def write_sample_weights(
    path: Path,
    sample_id: np.ndarray,
    position: np.ndarray | None,
    weight: np.ndarray,
    metadata: Mapping[str, Any],
    key: str = "sequence_id",
    swapped: np.ndarray | None = None,
) -> None:
    """Write a row a loss, or a row a sample when `position` is None (the weight holds for all its losses).

    `position`: 1 .. num_positions, for tokens the index of the predicted one; `weight` >= 0, without unit, 1 = as in
    the data; `key`: what a sample is called (`Task.key`); `swapped`: bool, samples whose labels are swapped, None: of
    none. Raises PatterningError for what `SampleWeights.load` would refuse.

    Examples:
        >>> from pathlib import Path
        >>> write_sample_weights(Path("plus.parquet"), np.arange(3), None, np.array([1.5, 1.0, 0.5]), metadata={})
        >>> SampleWeights.load(Path("plus.parquet")).scaled(0.5).weight  # half the step from 1
        array([1.25, 1.  , 0.75], dtype=float32)
    """
    sample_id, weight = np.asarray(sample_id, dtype=np.int64), np.asarray(weight, dtype=np.float32)
    position = None if position is None else np.asarray(position)
    _check(Path(path), key, sample_id, position, weight)
    if swapped is not None and position is not None:
        raise PatterningError(f"{path}: labels are swapped of whole samples; expected no positions")

    def rows(here: slice) -> pa.Table:
        positions = {} if position is None else {"position": pa.array(position[here].astype(np.int16))}
        swaps = {} if swapped is None else {"swapped": pa.array(np.asarray(swapped, bool)[here])}
        return pa.table({key: pa.array(sample_id[here]), **positions, "weight": pa.array(weight[here]), **swaps})

    parts = (rows(slice(start, start + ROWS)) for start in range(0, max(len(weight), 1), ROWS))
    write_parquet_parts(path, parts, metadata, compression="zstd")


def swaps_labels(path: Path) -> bool:
    """Whether a table has weights of samples whose labels are swapped."""
    with parquet_file(path) as file:
        return "swapped" in file.schema_arrow.names


def refuse_swaps(path: Path) -> None:
    """Raises PatterningError for a table that only trainings and chains of this package can follow."""
    if swaps_labels(path):
        raise PatterningError(
            f"{path}: swaps labels where weights would be below 0, and here weights alone are taken; take another"
        )


@dataclass(frozen=True)
class JoinedWeights:
    """`weights` float32 [sample] or [sample, position]; losses without a row weigh 1 and count as missing.

    `swapped` bool [sample]; None where no label is.
    """

    weights: np.ndarray
    num_missing: int
    num_joined: int
    swapped: np.ndarray | None = None


@dataclass(frozen=True)
class SampleWeights:
    """The rows of a weight table; `position` is None for weights of whole samples, `swapped` where no labels are."""

    path: Path
    key: str
    sample_id: np.ndarray
    position: np.ndarray | None
    weight: np.ndarray
    metadata: dict[str, Any]
    swapped: np.ndarray | None = None

    @classmethod
    def load(cls, path: Path, key: str = "sequence_id") -> SampleWeights:
        """Raises PatterningError, naming file and row (from 0), for a negative or non-finite weight, an id or
        position below its first value, a null, a key given twice, and swapped labels of single positions."""
        path = Path(path)
        table, metadata = read_parquet(path, [key, "weight"])
        sample_id = _numbers(path, table, key, np.int64)
        position = _numbers(path, table, "position", np.int64) if "position" in table.column_names else None
        weight = _numbers(path, table, "weight", np.float32)
        _check(path, key, sample_id, position, weight)
        return cls(path, key, sample_id, position, weight, metadata, _swapped(path, table, position))

    def scaled(self, strength: float) -> SampleWeights:
        """rho = 1 + strength * h, where the table has 1 + h. Raises PatterningError for a row that falls below 0.

        A sample whose labels are swapped has the weight 1 + h below 0: where 1 + strength * h is above, they are not.
        """
        if strength == 1:  # the bits of the table
            return self
        if self.swapped is not None:
            signed = 1 + strength * (np.where(self.swapped, -1.0, 1.0) * self.weight - 1)
            return replace(self, weight=np.abs(signed).astype(np.float32), swapped=signed < 0)
        weight = (1 + strength * (self.weight.astype(np.float64) - 1)).astype(np.float32)
        expected = f"expected 0 or more: lower the strength, which is {strength:g}, or solve for weights nearer to 1"
        _refuse(self.path, "1 + strength * (weight - 1)", weight, weight < 0, expected)
        return replace(self, weight=weight)

    def join(self, num_samples: int, num_positions: int | None, counted: np.ndarray | None = None) -> JoinedWeights:
        """Weights of all losses of a dataset.

        Args:
            num_samples: of the dataset.
            num_positions: losses of one sample; None where it has a single one.
            counted: [sample, position], losses that count; the others weigh 0 and are not missed. None: all.

        Raises:
            PatterningError: a row about a loss that the dataset lacks.
        """
        expected = f"the dataset has samples 0 to {num_samples - 1}; is this file for another one?"
        _refuse(self.path, self.key, self.sample_id, self.sample_id >= num_samples, expected)
        shape = (num_samples,) if num_positions is None else (num_samples, num_positions)
        weights, joined = np.ones(shape, np.float32), np.zeros(shape, bool)
        if self.position is None:
            weights[self.sample_id] = self.weight.reshape(-1, *[1] * (len(shape) - 1))
            joined[self.sample_id] = True
        else:
            if num_positions is None:
                raise PatterningError(
                    f"{self.path}: has a column 'position', and a sample has one loss here; remove the column"
                )
            expected = f"the dataset predicts positions 1 to {num_positions}; is this file for another one?"
            _refuse(self.path, "position", self.position, self.position > num_positions, expected)
            weights[self.sample_id, self.position - 1] = self.weight
            joined[self.sample_id, self.position - 1] = True
        if counted is not None:
            weights, joined = np.where(counted, weights, np.float32(0)), joined & counted
        num_joined = int(joined.sum())
        num_counted = joined.size if counted is None else int(counted.sum())
        swapped = None
        if self.swapped is not None and self.swapped.any():
            swapped = np.zeros(num_samples, bool)
            swapped[self.sample_id] = self.swapped
        return JoinedWeights(weights, num_counted - num_joined, num_joined, swapped)


def _swapped(path: Path, table: pa.Table, position: np.ndarray | None) -> np.ndarray | None:
    """bool [row] of the column ``swapped``; None without one."""
    if "swapped" not in table.column_names:
        return None
    column = table.column("swapped")
    if not pa.types.is_boolean(column.type) or column.null_count:
        kind = "nulls" if column.null_count else str(column.type)
        raise PatterningError(f"{path}: column 'swapped' holds {kind}; expected true or false: whether labels are")
    if position is not None:
        raise PatterningError(f"{path}: labels are swapped of whole samples; remove the column position, or swapped")
    return column.to_numpy()


def _numbers(path: Path, table: pa.Table, name: str, dtype: type) -> np.ndarray:
    column = table.column(name)
    if not (pa.types.is_integer(column.type) or (dtype is np.float32 and pa.types.is_floating(column.type))):
        raise PatterningError(
            f"{path}: column {name!r} holds {column.type}; expected "
            + ("numbers" if dtype is np.float32 else "whole numbers")
        )
    if column.null_count:
        row = column.is_null().to_numpy(zero_copy_only=False).argmax()
        raise PatterningError(f"{path} row {row}: {name} is null; give a value or leave the row out")
    return column.to_numpy().astype(dtype)


def _refuse(path: Path, name: str, values: np.ndarray, bad: np.ndarray, expected: str) -> None:
    if bad.any():
        row = int(bad.argmax())
        raise PatterningError(f"{path} row {row}: {name} is {values[row]}; {expected}")


def _check(path: Path, key: str, sample_id: np.ndarray, position: np.ndarray | None, weight: np.ndarray) -> None:
    lengths = {len(values) for values in (sample_id, position, weight) if values is not None}
    if len(lengths) > 1:
        raise ValueError(f"{path}: columns of different lengths {sorted(lengths)}")
    _refuse(path, "weight", weight, ~(np.isfinite(weight) & (weight >= 0)), "expected a finite number, 0 or more")
    _refuse(path, key, sample_id, sample_id < 0, "expected 0 or more")
    if position is not None:
        # 16 bits on disk.
        _refuse(path, "position", position, (position < 1) | (position > 32_767), "expected 1 to 32767")
    later = sample_id[1:] > sample_id[:-1]
    if position is not None:
        later |= (sample_id[1:] == sample_id[:-1]) & (position[1:] > position[:-1])
    if later.all():  # as the solver writes them; in another order they are sorted to be compared
        return
    keys = sample_id[:, None] if position is None else np.stack([sample_id, position], axis=1)
    order = np.lexsort(keys.T[::-1])
    same = np.flatnonzero((keys[order][1:] == keys[order][:-1]).all(axis=1))
    if len(same):
        # lexsort is stable: the later of two equal rows stands second.
        row = int(order[same + 1].min())
        which = ", ".join(f"{name} {value}" for name, value in zip((key, "position"), keys[row], strict=False))
        raise PatterningError(f"{path} row {row}: {which} was given before; expected one row for each")
