"""Files of rows, a few rows at a time, as Arrow arrays: Parquet, Arrow, JSON lines, and token ids end to end."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from patterning_dist.data.json_lines import json_rows, kind_of
from patterning_dist.errors import PatterningError, first_line
from patterning_dist.storage.files import parquet_file, require_columns

ROWS_AT_ONCE = 1024
STREAM = "input_ids"  # what the column of a file without names is called
# Of llm.c: magic numbers of a header of 256 int32, magic, version, number of tokens; and the type of the tokens.
_HEADERS: dict[int, np.dtype[Any]] = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
_HEADER_BYTES = 1024

Columns = Mapping[str, pa.Array]
Choose = Callable[[Path | str, Sequence[str]], Sequence[str]]  # file, its columns -> those that are read


def read_rows(path: Path, choose: Choose) -> Iterator[tuple[int, Columns]]:
    """Number of the first row of a batch, and its chosen columns.

    Args:
        path: ``.jsonl``, ``.json`` (also compressed: ``.jsonl.gz``), ``.arrow``, ``.feather``, ``.npy`` (tokens end to
            end, or a row a line), ``.bin`` (16-bit token ids end to end as nanoGPT has them, or with the header of
            llm.c), else Parquet.
        choose: which columns; may be asked again where the columns of a file are not the same throughout.

    Raises:
        PatterningError: naming file and row: what cannot be read.
    """
    suffix = kind_of(path)
    check_name(path)
    if suffix in (".npy", ".bin"):
        _chosen(path, choose, [STREAM])
        yield 0, {STREAM: (_npy if suffix == ".npy" else _bin)(path)}
    elif suffix in (".jsonl", ".json"):
        yield from _json(path, choose)
    elif suffix in (".arrow", ".feather"):
        yield from _arrow(path, choose)
    else:
        yield from parquet_rows(path, choose)


READABLE = (".parquet", ".jsonl", ".arrow", ".feather", ".npy", ".bin")  # looked for in folders


def files_in(folder: Path) -> list[Path]:
    """Files of rows in a folder, at any depth, by name; hidden ones are none.

    Raises:
        PatterningError: they are of several kinds, so that some may not be meant.
    """
    files = sorted(p for p in folder.rglob("*") if kind_of(p) in READABLE and p.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    kinds = sorted({kind_of(file) for file in files})
    if len(kinds) > 1:
        raise PatterningError(f"{folder}: holds files of several kinds, {', '.join(kinds)}; give one kind a folder")
    return files


def check_name(path: Path) -> None:
    """Raises PatterningError for a name that is not UTF-8, which no table and no page could hold."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise PatterningError(f"{os.fsencode(path)!r}: a file name that is not UTF-8; rename it") from None


def parquet_rows(path: Path, choose: Choose) -> Iterator[tuple[int, Columns]]:
    """See ``read_rows``."""
    with parquet_file(path) as file:
        columns = _chosen(path, choose, file.schema_arrow.names)
        yield from _batches(path, file.iter_batches(ROWS_AT_ONCE, columns=columns), columns)


def _chosen(path: Path, choose: Choose, names: Sequence[str]) -> list[str]:
    columns = list(choose(path, names))
    require_columns(path, names, columns)
    return columns


def _arrow(path: Path, choose: Choose) -> Iterator[tuple[int, Columns]]:
    with pa.memory_map(str(path)) as source:
        try:
            table = pa.ipc.open_file(source).read_all()
        except pa.ArrowException:
            try:
                table = pa.ipc.open_stream(source).read_all()
            except (pa.ArrowException, OSError) as error:
                raise PatterningError(f"{path}: not a readable Arrow file ({first_line(error)})") from None
        columns = _chosen(path, choose, table.column_names)
        yield from _batches(path, table.select(columns).to_batches(ROWS_AT_ONCE), columns)


def _batches(path: Path, batches: Iterable[Any], columns: Sequence[str]) -> Iterator[tuple[int, Columns]]:
    first, batches = 0, iter(batches)
    while True:
        try:
            batch = next(batches, None)
        except (OSError, pa.ArrowException) as error:
            raise PatterningError(
                f"{path}: cannot be read from row {first} on ({first_line(error)}); copy or write it again"
            ) from None
        if batch is None:
            return
        yield first, {name: checked(path, first, name, batch.column(name)) for name in columns}
        first += batch.num_rows


def _json(path: Path, choose: Choose) -> Iterator[tuple[int, Columns]]:
    first, before = 0, None
    every = (row for _, row in json_rows(path))
    while rows := list(islice(every, ROWS_AT_ONCE)):
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = _chosen(path, choose, names)
        if before is not None and set(columns) != set(before):
            name = min(set(columns) ^ set(before))
            raise PatterningError(f"{path}: {name!r} is in some rows and not in others; give it in all, or in none")
        yield first, {name: _array(path, first, name, [row.get(name) for row in rows]) for name in columns}
        first, before = first + len(rows), columns


def _array(path: Path, first: int, name: str, values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError) as error:
        raise PatterningError(
            f"{path}: {name!r} of the rows from {first} on is not of one kind ({first_line(error)}); mend them"
        ) from None


def _npy(path: Path) -> pa.Array:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PatterningError(f"{path}: not a readable array ({first_line(error)}); write it with numpy.save") from None
    if tokens.ndim not in (1, 2) or tokens.dtype.kind not in "iu":
        shape = f"{tokens.dtype} {list(tokens.shape)}"
        raise PatterningError(f"{path}: holds {shape}; expected token ids, end to end or [row, position]")
    return _end_to_end(tokens.reshape(-1), tokens.shape[-1])


def _bin(path: Path) -> pa.Array:
    start = np.fromfile(path, "<i4", count=3)
    header = _HEADERS.get(int(start[0])) if len(start) == 3 else None
    kind: np.dtype[Any] = header or np.dtype("<u2")
    offset = 0 if header is None else _HEADER_BYTES
    size = path.stat().st_size - offset
    if size <= 0 or size % kind.itemsize:
        raise PatterningError(f"{path}: {max(size, 0)} bytes of tokens; expected a multiple of {kind.itemsize}")
    tokens = np.memmap(path, kind, "r", offset)
    if header is not None and int(start[2]) != len(tokens):
        raise PatterningError(f"{path}: its header says {start[2]} tokens, and there are {len(tokens)}; copy it again")
    if header is None and len(tokens) > 3 and not tokens[1:2048:2].any():
        raise PatterningError(
            f"{path}: every second 16-bit number is 0, as in a file of 32-bit ones; write token ids as numpy.uint16, "
            "or with numpy.save into a .npy file"
        )
    return _end_to_end(tokens, len(tokens))


def _end_to_end(tokens: np.ndarray, row_length: int) -> pa.Array:
    starts = np.arange(0, len(tokens) + 1, max(row_length, 1), dtype=np.int64)
    return pa.LargeListArray.from_arrays(starts, pa.array(tokens.astype(tokens.dtype.newbyteorder("="), copy=False)))


def checked(path: Path | str, first: int, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column as plain lists, strings and numbers; one that holds them through dictionaries or views is copied.

    Raises:
        PatterningError: naming file and row: what is damaged, or text that is not UTF-8.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    try:
        array.validate(full=True)
    except pa.ArrowException as error:
        bad = re.search(r"UTF8 sequence at string index (\d+)", str(error))
        row = "" if bad is None else f" row {first + int(bad[1])}"
        what = first_line(error) if bad is None else "text that is not UTF-8"
        raise PatterningError(f"{path}{row}: column {name!r} is damaged ({what}); mend it or write it again") from None
    return _plain(array)


def _plain(array: pa.Array) -> pa.Array:
    kind = array.type
    if pa.types.is_dictionary(kind):
        return _plain(array.dictionary_decode())
    if pa.types.is_run_end_encoded(kind):
        return _plain(pc.run_end_decode(array))
    if pa.types.is_string_view(kind):
        return array.cast(pa.large_string())
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind) or pa.types.is_fixed_size_list(kind):
        # A cast of views with a null among them is not valid in pyarrow 26.
        lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return pa.LargeListArray.from_arrays(starts, pc.list_flatten(array), mask=array.is_null())
    return array
