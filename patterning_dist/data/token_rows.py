"""Rows of token ids, or of text, in files, in this project's token tables and in datasets, a few at a time."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.data import row_files
from patterning_dist.data.json_lines import stem_of
from patterning_dist.data.row_files import READABLE, Choose, Columns, checked, files_in, read_rows
from patterning_dist.errors import PatterningError, first_line
from patterning_dist.storage.files import METADATA_KEY, parquet_file, read_parquet, require_columns, token_dtype

DOCUMENT = "document"  # column that says what a row is a part of
_SHARD = re.compile(r"-\d+-of-\d+$")  # train-00000-of-00004.parquet


@dataclass(frozen=True)
class Rows:
    """Some rows of one file.

    Attributes:
        file: where they are.
        first: number of the first row in the file.
        columns: of the table by name, each a row long.
        unused: names of the other columns of the file.
        own: where the file is a token table of this project, its header; the tokens are in ``tokens``.
    """

    file: Path | str
    first: int
    columns: Columns
    unused: tuple[str, ...] = ()
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
            return np.full(len(self), _SHARD.sub("", stem_of(Path(self.file))), dtype=object)
        if domains.null_count:
            self.refuse(
                domains.is_null().to_numpy(zero_copy_only=False), "domain is null; name it or remove the column"
            )
        return np.array([str(domain) for domain in domains.to_pylist()], dtype=object)

    def documents(self) -> np.ndarray | None:
        """[row]: numbers or names of the ``document`` column; None without one.

        Raises:
            PatterningError: a document is null.
        """
        if DOCUMENT not in self.columns:
            return None
        self.refuse_nulls(DOCUMENT, "name it or remove the column")
        return self.columns[DOCUMENT].to_numpy(zero_copy_only=False)

    def origins(self, rows: np.ndarray) -> np.ndarray:
        """object [row, 2]: file and number in it."""
        found = np.empty((len(rows), 2), object)
        found[:, 0], found[:, 1] = self.file, rows + self.first
        return found

    def lists(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of a column of lists, end to end, and where each row begins [row + 1].

        Raises:
            PatterningError: no lists of whole numbers, or a null.
        """
        lists = self.columns[column]
        self.refuse_nulls(column, "give token ids or leave the row out")
        if is_list(lists) and pa.types.is_null(lists.type.value_type):  # every list is empty
            lists = lists.cast(pa.list_(pa.int64()))
        if not is_list(lists) or not pa.types.is_integer(lists.type.value_type):
            raise PatterningError(
                f"{self.file}: column {column!r} holds {lists.type}; expected lists of whole numbers, the token ids"
            )
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

    def refuse_nulls(self, column: str, remedy: str) -> None:
        """Raise PatterningError about the first null of a column."""
        if self.columns[column].null_count:
            nulls = self.columns[column].is_null().to_numpy(zero_copy_only=False)
            self.refuse(nulls, f"{column} is null; {remedy}")

    def refuse(self, bad: np.ndarray, what: str) -> None:
        """Raise PatterningError about the first bad row, if there is one."""
        if bad.any():
            raise PatterningError(f"{self.file} row {self.first + int(np.argmax(bad))}: {what}")

    def refuse_entry(self, bad: np.ndarray, offsets: np.ndarray, what: str) -> None:
        """``refuse`` the row of the first bad entry of lists that begin at ``offsets``."""
        if bad.any():
            self.refuse(np.logical_or.reduceat(np.append(bad, False), offsets[:-1]) & (np.diff(offsets) > 0), what)


def is_list(array: pa.Array) -> bool:
    """Whether a value of a column is a list."""
    return pa.types.is_list(array.type) or pa.types.is_large_list(array.type)


def unused_columns(path: str, names: Collection[str]) -> list[str]:
    """What there is to say of columns that are not read."""
    return [f"{path}: columns that have no effect: {', '.join(names)}"] if names else []


def find_rows(path: str, choose: Choose, others: Sequence[str] = ()) -> Iterator[Rows]:
    """The rows behind a path or a name.

    Args:
        path: a file (see ``row_files.read_rows``) or a folder of such files of one kind; the folder of a ``datasets``
            dataset saved to disk; or the name of one on the hub, ``owner/name`` or ``owner/name:split``.
        choose: of a file and the names of its columns, those that must be there. A token table of this project is
            read as it is, and not asked about.
        others: columns that are read where they are there, besides ``domain``.

    Raises:
        PatterningError: nothing there, several splits and none chosen, no such column, or what cannot be read.
    """
    place = Path(path)
    found: dict[str, tuple[str, ...]] = {}  # file -> columns that are not read

    def chosen(file: Path | str, names: Sequence[str]) -> list[str]:
        needed = list(choose(file, names))
        columns = list(dict.fromkeys([*needed, *(name for name in (*others, "domain") if name in names)]))
        found[str(file)] = tuple(name for name in names if name not in columns)
        return columns

    def rows(file: Path | str, batches: Iterator[tuple[int, Columns]]) -> Iterator[Rows]:
        for first, columns in batches:
            yield Rows(file, first, columns, found[str(file)])

    def of_file(file: Path) -> Iterator[Rows]:
        return _token_table_rows(file) if _is_token_table(file) else rows(file, read_rows(file, chosen))

    if place.is_file():
        return of_file(place)
    if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
        return rows(place, _dataset_rows(_saved_dataset(place), place, chosen))
    if place.is_dir():
        files = files_in(place)
        if not files:
            raise PatterningError(
                f"{path}: no *.parquet in this folder, and no dataset saved by save_to_disk, nor any of "
                f"{', '.join('*' + suffix for suffix in READABLE[1:])}"
            )
        return (found for file in files for found in of_file(file))
    if place.suffix or place.is_absolute() or path.startswith("."):
        raise PatterningError(
            f"{path}: no such file or folder; expected Parquet, or a dataset saved by save_to_disk, or one of "
            f"{', '.join('*' + suffix for suffix in READABLE[1:])}"
        )
    return rows(path, _dataset_rows(_hub_dataset(path), path, chosen))


def _is_token_table(path: Path) -> bool:
    if path.suffix.lower() != ".parquet":
        return False
    with parquet_file(path) as file:
        schema = file.schema_arrow
    return METADATA_KEY in (schema.metadata or {}) and {"sequence_id", "tokens"} <= set(schema.names)


def _token_table_rows(path: Path) -> Iterator[Rows]:
    """Rows that ``tokens.write_token_table`` wrote."""
    table, header = read_parquet(path, ["sequence_id", "domain", DOCUMENT, "tokens"])
    if missing := {"context_length", "vocabulary_size"} - header.keys():
        raise PatterningError(f"{path}: no {min(missing)!r} in the schema metadata; expected a token table")
    length, kind = header["context_length"], table.schema.field("tokens").type
    number = pa.from_numpy_dtype(np.dtype(token_dtype(header["vocabulary_size"])))
    if kind != pa.binary(number.byte_width * length):
        raise PatterningError(
            f"{path}: column 'tokens' holds {kind}; expected {number.byte_width * length} bytes a row"
        )
    if not np.array_equal(table["sequence_id"].to_numpy(), np.arange(len(table))):
        raise PatterningError(f"{path}: sequence_id is not the row number; write the table again")
    first = 0
    for batch in table.to_batches(row_files.ROWS_AT_ONCE):
        cells = batch["tokens"]
        values = pa.Array.from_buffers(
            number, len(cells) * length, [None, cells.buffers()[1]], offset=cells.offset * length
        )
        lists = pa.LargeListArray.from_arrays(np.arange(len(cells) + 1) * length, values)
        columns = {"tokens": lists, "domain": batch["domain"], DOCUMENT: batch[DOCUMENT]}
        yield Rows(path, first, columns, own=header)
        first += len(batch)


def _dataset_rows(dataset: Any, path: Path | str, choose: Choose) -> Iterator[tuple[int, Columns]]:
    columns, first = list(choose(path, dataset.column_names)), 0
    require_columns(path, dataset.column_names, columns)
    for table in dataset.select_columns(columns).with_format("arrow").iter(row_files.ROWS_AT_ONCE):
        yield first, {name: checked(path, first, name, table[name]) for name in columns}
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
