"""Sample weights rho keyed by (sequence, position): from a solver or from the user, joined to a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.errors import PatterningError
from patterning_dist.storage.files import read_parquet, write_parquet


def write_sample_weights(
    path: Path,
    sequence_id: np.ndarray,
    position: np.ndarray | None,
    weight: np.ndarray,
    metadata: Mapping[str, Any],
) -> None:
    """Write a row a token, or a row a sequence when `position` is None (the weight holds for all its tokens).

    `position`: 1 .. context_length-1, index of the predicted token; `weight` >= 0, without unit, 1 = as in
    the data. Raises PatterningError for what `SampleWeights.load` would refuse.
    """
    sequence_id, weight = np.asarray(sequence_id, dtype=np.int64), np.asarray(weight, dtype=np.float32)
    columns = {"sequence_id": pa.array(sequence_id)}
    if position is not None:
        position = np.asarray(position, dtype=np.int64)
        columns["position"] = pa.array(position.astype(np.int16))
    _check(Path(path), sequence_id, position, weight)
    columns["weight"] = pa.array(weight)
    write_parquet(path, pa.table(columns), metadata, compression="zstd")


@dataclass(frozen=True)
class JoinedWeights:
    """`weights` float32 [N, L-1] (sample position); tokens without a row weigh 1 and count as missing."""

    weights: np.ndarray
    num_missing: int
    num_joined: int


@dataclass(frozen=True)
class SampleWeights:
    """The rows of a weight table; `position` is None for weights of whole sequences."""

    path: Path
    sequence_id: np.ndarray
    position: np.ndarray | None
    weight: np.ndarray
    metadata: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> SampleWeights:
        """Raises PatterningError, naming file and row (from 0), for a negative or non-finite weight, an id or
        position below its first value, a null, and a key given twice."""
        path = Path(path)
        table, metadata = read_parquet(path, ["sequence_id", "weight"])
        sequence_id = _numbers(path, table, "sequence_id", np.int64)
        position = _numbers(path, table, "position", np.int64) if "position" in table.column_names else None
        weight = _numbers(path, table, "weight", np.float32)
        _check(path, sequence_id, position, weight)
        return cls(path, sequence_id, position, weight, metadata)

    def join(self, num_sequences: int, context_length: int) -> JoinedWeights:
        """Weights of all tokens of a dataset. Raises PatterningError for a row about a token it lacks."""
        _refuse(
            self.path,
            "sequence_id",
            self.sequence_id,
            self.sequence_id >= num_sequences,
            f"the dataset has sequences 0 to {num_sequences - 1}; is this file for another one?",
        )
        weights = np.ones((num_sequences, context_length - 1), dtype=np.float32)
        joined = np.zeros(weights.shape, dtype=bool)
        if self.position is None:
            weights[self.sequence_id] = self.weight[:, None]
            joined[self.sequence_id] = True
        else:
            _refuse(
                self.path,
                "position",
                self.position,
                self.position >= context_length,
                f"the dataset predicts positions 1 to {context_length - 1}; is this file for another one?",
            )
            weights[self.sequence_id, self.position - 1] = self.weight
            joined[self.sequence_id, self.position - 1] = True
        num_joined = int(joined.sum())
        return JoinedWeights(weights, joined.size - num_joined, num_joined)


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


def _check(path: Path, sequence_id: np.ndarray, position: np.ndarray | None, weight: np.ndarray) -> None:
    lengths = {len(values) for values in (sequence_id, position, weight) if values is not None}
    if len(lengths) > 1:
        raise ValueError(f"{path}: columns of different lengths {sorted(lengths)}")
    _refuse(path, "weight", weight, ~(np.isfinite(weight) & (weight >= 0)), "expected a finite number, 0 or more")
    _refuse(path, "sequence_id", sequence_id, sequence_id < 0, "expected 0 or more")
    keys = sequence_id[:, None]
    if position is not None:
        # 16 bits on disk.
        _refuse(path, "position", position, (position < 1) | (position > 32_767), "expected 1 to 32767")
        keys = np.stack([sequence_id, position], axis=1)
    order = np.lexsort(keys.T[::-1])
    same = np.flatnonzero((keys[order][1:] == keys[order][:-1]).all(axis=1))
    if len(same):
        # lexsort is stable: the later of two equal rows stands second.
        row = int(order[same + 1].min())
        key = ", ".join(f"{name} {value}" for name, value in zip(("sequence_id", "position"), keys[row], strict=False))
        raise PatterningError(f"{path} row {row}: {key} was given before; expected one row for each")
