"""Rows of token ids in Parquet, in this project's token tables and in datasets of ``datasets``, a few at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from patterning_dist.data.tokens import TokenDataset
from patterning_dist.errors import PatterningError
from patterning_dist.storage.files import METADATA_KEY, require_columns

_ROWS_AT_ONCE = 1024
_SHARD = re.compile(r"-\d+-of-\d+$")  # train-00000-of-00004.parquet


@dataclass(frozen=True)
class Rows:
    """Rows of one file: where they are, their token ids, and their domains where the file has them."""

    file: Path | str
    first: int
    lists: pa.Array
    domains: pa.Array | None

    def domain_names(self) -> np.ndarray:
        """object [row]: what the ``domain`` column says, else the stem of the file.

        Raises:
            PatterningError: a domain is null.
        """
        if self.domains is None:
            return np.full(len(self.lists), _SHARD.sub("", Path(self.file).stem), dtype=object)
        if self.domains.null_count:
            row = self.first + int(np.argmax(self.domains.is_null().to_numpy(zero_copy_only=False)))
            raise PatterningError(f"{self.file} row {row}: domain is null; name it or remove the column")
        return np.array([str(domain) for domain in self.domains.to_pylist()], dtype=object)


def find_rows(path: str, column: str) -> Iterator[Rows]:
    """The rows behind a path or a name; see ``tokenised.load_tokens``."""
    place = Path(path)
    if place.is_file():
        return _parquet_rows(place, column)
    if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
        return _dataset_rows(_saved_dataset(place), place, column)
    if place.is_dir():
        files = [file for file in sorted(place.rglob("*.parquet")) if not file.name.startswith(".")]
        if not files:
            raise PatterningError(f"{path}: no *.parquet in this folder, and no dataset saved by save_to_disk")
        return (rows for file in files for rows in _parquet_rows(file, column))
    if place.suffix or place.is_absolute() or path.startswith("."):
        raise PatterningError(f"{path}: no such file or folder; expected Parquet, or a dataset saved by save_to_disk")
    return _dataset_rows(_hub_dataset(path), path, column)


def _parquet_rows(path: Path, column: str) -> Iterator[Rows]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise PatterningError(f"{path}: not a readable Parquet file ({error})") from None
    with file:
        schema = file.schema_arrow
        if METADATA_KEY in (schema.metadata or {}) and column not in schema.names and "tokens" in schema.names:
            yield from _token_table_rows(path)
            return
        _check_column(path, schema, column)
        columns = [name for name in (column, "domain") if name in schema.names]
        first = 0
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
            yield Rows(path, first, batch[column], batch["domain"] if "domain" in columns else None)
            first += len(batch)


def _token_table_rows(path: Path) -> Iterator[Rows]:
    table = TokenDataset(path)
    for first in range(0, len(table), _ROWS_AT_ONCE):
        tokens = table.tokens(np.arange(first, min(first + _ROWS_AT_ONCE, len(table))))
        offsets = np.arange(len(tokens) + 1) * table.context_length
        lists = pa.LargeListArray.from_arrays(offsets, tokens.reshape(-1))
        yield Rows(path, first, lists, pa.array(table.domains[first : first + len(tokens)]))


def _dataset_rows(dataset: Any, path: Path | str, column: str) -> Iterator[Rows]:
    _check_column(path, dataset.features.arrow_schema, column)
    columns = [name for name in (column, "domain") if name in dataset.column_names]
    first = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(_ROWS_AT_ONCE):
        lists, domains = (table[name].combine_chunks() if name in columns else None for name in (column, "domain"))
        yield Rows(path, first, lists, domains)
        first += len(table)


def _saved_dataset(folder: Path) -> Any:
    try:
        return _one_split(_datasets(folder).load_from_disk(str(folder)), f"{folder}", "/")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise PatterningError(f"{folder}: not a readable dataset ({_first_line(error)}); save it again") from None


def _hub_dataset(path: str) -> Any:
    name, _, split = path.partition(":")
    try:
        return _one_split(_datasets(path).load_dataset(name, split=split or None), name, ":")
    except (OSError, ValueError, RuntimeError) as error:
        raise PatterningError(
            f"{path}: no such file or folder, and not to be had as a dataset from the local cache or the hub "
            f"({_first_line(error)}); give a Parquet file or folder"
        ) from None


def _datasets(path: Path | str) -> Any:
    try:
        import datasets
    except ImportError:
        raise PatterningError(f"{path}: needs the package datasets; pip install patterning-dist[hf]") from None
    return datasets


def _one_split(dataset: Any, name: str, joint: str) -> Any:
    if not isinstance(dataset, dict):
        return dataset
    if len(dataset) != 1:
        raise PatterningError(
            f"{name}: there are {len(dataset)} splits; give one: {', '.join(name + joint + s for s in dataset)}"
        )
    return next(iter(dataset.values()))


def _check_column(path: Path | str, schema: pa.Schema, column: str) -> None:
    require_columns(path, schema.names, [column])
    kind = schema.field(column).type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not pa.types.is_integer(kind.value_type):
        raise PatterningError(f"{path}: column {column!r} holds {kind}; expected lists of whole numbers, the token ids")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
