"""Rows of token ids in Parquet, in this project's token tables and in datasets of ``datasets``, a few at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.errors import PatterningError, first_line
from patterning_dist.storage.files import METADATA_KEY, parquet_file, read_parquet, require_columns

_ROWS_AT_ONCE = 1024
_SHARD = re.compile(r"-\d+-of-\d+$")  # train-00000-of-00004.parquet


@dataclass(frozen=True)
class Rows:
    """Some rows of one file.

    Attributes:
        file: where they are.
        first: number of the first row in the file.
        columns: of the table by name, each a row long.
        own: where the file is a token table of this project, its header.
    """

    file: Path | str
    first: int
    columns: Mapping[str, pa.Array]
    own: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def domain_names(self) -> np.ndarray:
        """object [row]: what the ``domain`` column says, else the stem of the file.

        Raises:
            PatterningError: a domain is null.
        """
        domains = self.columns.get("domain")
        if domains is None:
            return np.full(len(self), _SHARD.sub("", Path(self.file).stem), dtype=object)
        if domains.null_count:
            self.refuse(
                domains.is_null().to_numpy(zero_copy_only=False), "domain is null; name it or remove the column"
            )
        return np.array([str(domain) for domain in domains.to_pylist()], dtype=object)

    def origins(self, rows: np.ndarray) -> np.ndarray:
        """object [row, 2]: file and number in it."""
        found = np.empty((len(rows), 2), object)
        found[:, 0], found[:, 1] = self.file, rows + self.first
        return found

    def lists(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of a column of lists, end to end, and where each row begins [row + 1].

        Raises:
            PatterningError: a null.
        """
        lists = self.columns[column]
        if lists.null_count:
            nulls = lists.is_null().to_numpy(zero_copy_only=False)
            self.refuse(nulls, f"{column} is null; give token ids or leave the row out")
        if pa.types.is_fixed_size_list(lists.type):
            lists = lists.cast(pa.list_(lists.type.value_type))
        offsets = lists.offsets.to_numpy().astype(np.int64)
        values = lists.values[int(offsets[0]) : int(offsets[-1])]
        offsets -= offsets[0]
        if values.null_count:
            self.refuse_entry(
                values.is_null().to_numpy(zero_copy_only=False), offsets, f"{column} holds a null; mend that row"
            )
        return values.to_numpy(zero_copy_only=False), offsets

    def token_ids(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """``lists`` of token ids.

        Raises:
            PatterningError: a number that is no token.
        """
        ids, offsets = self.lists(column)
        for bad, what in ((ids < 0, "negative number"), (ids > np.iinfo(np.int32).max, "number above 2147483647")):
            self.refuse_entry(bad, offsets, f"{column} holds a {what}, which is no token; mend that row")
        return ids, offsets

    def refuse(self, bad: np.ndarray, what: str) -> None:
        """Raise PatterningError about the first bad row, if there is one."""
        if bad.any():
            raise PatterningError(f"{self.file} row {self.first + int(np.argmax(bad))}: {what}")

    def refuse_entry(self, bad: np.ndarray, offsets: np.ndarray, what: str) -> None:
        """``refuse`` the row of the first bad entry of lists that begin at ``offsets``."""
        if bad.any():
            self.refuse(np.logical_or.reduceat(np.append(bad, False), offsets[:-1]) & (np.diff(offsets) > 0), what)


def find_rows(path: str, lists: Sequence[str], others: Sequence[str] = ()) -> Iterator[Rows]:
    """The rows behind a path or a name.

    Args:
        path: a Parquet file or a folder of them; a token table of this project, whose tokens then bear the first name
            of ``lists``; the folder of a ``datasets`` dataset saved to disk; or the name of one on the hub,
            ``owner/name`` or ``owner/name:split``.
        lists: columns of lists of whole numbers that must be there.
        others: columns that are read where they are there, besides ``domain``.

    Raises:
        PatterningError: nothing there, several splits and none chosen, no such column or not one of lists of integers.
    """
    place = Path(path)

    def choose(file: Path | str, schema: pa.Schema) -> list[str]:
        for column in lists:
            _check_column(file, schema, column)
        return [*lists, *(name for name in (*others, "domain") if name in schema.names)]

    if place.is_file():
        return _parquet_rows(place, choose, lists[0])
    if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
        return _dataset_rows(_saved_dataset(place), place, choose)
    if place.is_dir():
        files = [file for file in sorted(place.rglob("*.parquet")) if not file.name.startswith(".")]
        if not files:
            raise PatterningError(f"{path}: no *.parquet in this folder, and no dataset saved by save_to_disk")
        return (rows for file in files for rows in _parquet_rows(file, choose, lists[0]))
    if place.suffix or place.is_absolute() or path.startswith("."):
        raise PatterningError(f"{path}: no such file or folder; expected Parquet, or a dataset saved by save_to_disk")
    return _dataset_rows(_hub_dataset(path), path, choose)


Choose = Callable[[Path | str, pa.Schema], list[str]]


def _parquet_rows(path: Path, choose: Choose, column: str) -> Iterator[Rows]:
    with parquet_file(path) as file:
        schema = file.schema_arrow
        if METADATA_KEY in (schema.metadata or {}) and column not in schema.names and "tokens" in schema.names:
            yield from _token_table_rows(path, column)
            return
        columns, first = choose(path, schema), 0
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
            yield Rows(path, first, {name: batch[name] for name in columns})
            first += len(batch)


def _token_table_rows(path: Path, column: str) -> Iterator[Rows]:
    """Rows that ``tokens.write_token_table`` wrote."""
    table, header = read_parquet(path, ["sequence_id", "domain", "document", "tokens"])
    if missing := {"context_length", "vocabulary_size"} - header.keys():
        raise PatterningError(f"{path}: no {min(missing)!r} in the schema metadata; expected a token table")
    length, kind = header["context_length"], table.schema.field("tokens").type
    if kind != pa.binary(2 * length):
        raise PatterningError(f"{path}: column 'tokens' holds {kind}; expected {2 * length} bytes a row")
    if not np.array_equal(table["sequence_id"].to_numpy(), np.arange(len(table))):
        raise PatterningError(f"{path}: sequence_id is not the row number; write the table again")
    first = 0
    for batch in table.to_batches(_ROWS_AT_ONCE):
        cells = batch["tokens"]
        values = pa.Array.from_buffers(
            pa.uint16(), len(cells) * length, [None, cells.buffers()[1]], offset=cells.offset * length
        )
        lists = pa.LargeListArray.from_arrays(np.arange(len(cells) + 1) * length, values)
        columns = {column: lists, "domain": batch["domain"], "document": batch["document"]}
        yield Rows(path, first, columns, header)
        first += len(batch)


def _dataset_rows(dataset: Any, path: Path | str, choose: Choose) -> Iterator[Rows]:
    columns, first = choose(path, dataset.features.arrow_schema), 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(_ROWS_AT_ONCE):
        yield Rows(path, first, {name: table[name].combine_chunks() for name in columns})
        first += len(table)


def _saved_dataset(folder: Path) -> Any:
    try:
        return _one_split(_datasets(folder).load_from_disk(str(folder)), f"{folder}", "/")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise PatterningError(f"{folder}: not a readable dataset ({first_line(error)}); save it again") from None


def _hub_dataset(path: str) -> Any:
    name, _, split = path.partition(":")
    try:
        return _one_split(_datasets(path).load_dataset(name, split=split or None), name, ":")
    except (OSError, ValueError, RuntimeError) as error:
        raise PatterningError(
            f"{path}: no such file or folder, and not to be had as a dataset from the local cache or the hub "
            f"({first_line(error)}); give a Parquet file or folder"
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
