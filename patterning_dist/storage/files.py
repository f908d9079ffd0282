"""Files that are either whole or not there: atomic writing, strict reading, and errors that name the file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patterning_dist.errors import PatterningError, first_line

if TYPE_CHECKING:  # numpy and pyarrow are imported where they are used: the command line stays quick
    import numpy
    import pyarrow.parquet

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
ROWS = 1 << 20  # of a part of a long table
METADATA_KEY = b"patterning"


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError met while writing into a PatterningError that names the path and the remedy."""
    try:
        yield
    except OSError as error:
        full = error.errno in NO_SPACE
        remedy = "free some disk space" if full else "make it writable, or choose another with --run-dir"
        raise PatterningError(
            f"{path}: cannot be written ({error.strerror or error}); {remedy}, and run the same command again"
        ) from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which becomes `path` when the block ends well: whole, or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            # The new name is itself an entry that a power cut can lose.
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Strict JSON: a NaN or infinity, which JSON has no word for, becomes null."""
    write_text(path, json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; empty where there is no such file, or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_result(path: Path) -> dict[str, Any]:
    """The object that a stage wrote as JSON.

    Raises:
        PatterningError: the file is gone or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise PatterningError(
            f"{path}: cannot be read ({first_line(error)}); delete it, and `patterning run` writes it again"
        ) from None
    return found


def write_npz(path: Path, arrays: Mapping[str, numpy.ndarray]) -> None:
    import numpy

    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        numpy.savez(file, allow_pickle=False, **arrays)


def write_npy(path: Path, shape: tuple[int, ...], parts: Iterable[numpy.ndarray]) -> None:
    """Write parts of one type, at least one, as an array of a shape, in the order of its memory; not atomically.

    Not by a memory map, whose writer dies of a full disk without a word.
    """
    import numpy

    path.parent.mkdir(parents=True, exist_ok=True)
    with explained(path), open(path, "wb") as file:
        for number, part in enumerate(parts):
            if number == 0:
                header = {"descr": part.dtype.str, "fortran_order": False, "shape": shape}
                numpy.lib.format.write_array_header_1_0(file, header)
            file.write(numpy.ascontiguousarray(part).data)


def plain(value: Any) -> Any:
    """``value`` in the words that JSON has: numpy and torch become lists, NaN and infinity null."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed_files(folder: Path, digests: Mapping[str, str], sha256: Callable[[Path], str] = file_sha256) -> list[str]:
    """Those of the files that are gone, or have other contents than when they were written, in order.

    Args:
        folder: that they are in.
        digests: name -> SHA-256 of the contents.
        sha256: of a file; ``FileHashes`` reads each once.
    """

    def is_changed(name: str) -> bool:
        try:
            return sha256(folder / name) != digests[name]
        except OSError:
            return True

    return [name for name, changed in zip(digests, _in_threads(is_changed, digests), strict=True) if changed]


def digests_of(folder: Path, names: Iterable[str], sha256: Callable[[Path], str] = file_sha256) -> dict[str, str]:
    """Name -> SHA-256 of the contents, as ``changed_files`` takes them."""
    names = list(names)
    return dict(zip(names, _in_threads(lambda name: sha256(folder / name), names), strict=True))


def _in_threads(function: Callable[[str], Any], names: Iterable[str]) -> list[Any]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # a digest is taken outside the interpreter's lock
        return list(pool.map(function, names))


def write_parquet(
    path: Path, table: pyarrow.Table, metadata: Mapping[str, Any] | None = None, compression: str = "zstd"
) -> None:
    """Write `table`, with `metadata` as JSON in its schema."""
    write_parquet_parts(path, [table], metadata, compression)


def write_parquet_parts(
    path: Path,
    tables: Iterable[pyarrow.Table],
    metadata: Mapping[str, Any] | None = None,
    compression: str = "zstd",
) -> None:
    """Write tables of the same columns, at least one, below each other, each before the next is asked for."""
    with atomic_path(path) as temporary:
        _write_tables(tables, temporary, metadata, compression)


def parquet_bytes(table: pyarrow.Table, metadata: Mapping[str, Any] | None = None) -> bytes:
    """What ``write_parquet`` writes, for a file that lies elsewhere."""
    buffer = io.BytesIO()
    _write_tables([table], buffer, metadata, "zstd")
    return buffer.getvalue()


def _write_tables(
    tables: Iterable[pyarrow.Table], where: Any, metadata: Mapping[str, Any] | None, compression: str
) -> None:
    import pyarrow.parquet

    header = {METADATA_KEY: json.dumps(plain(metadata or {}), sort_keys=True)}
    writer = None
    with contextlib.ExitStack() as stack:
        for part in tables:
            table = part.replace_schema_metadata(header)
            if writer is None:
                writer = pyarrow.parquet.ParquetWriter(
                    where,
                    table.schema,
                    compression=compression,
                    use_dictionary=[name for name in table.column_names if name == "domain"],
                    version="2.6",
                )
                stack.enter_context(writer)
            writer.write_table(table)


def read_parquet(path: Path, columns: Iterable[str]) -> tuple[pyarrow.Table, dict[str, Any]]:
    """The table, of a file or of a folder of files, and its JSON header ({} when there is none).

    Raises PatterningError for a missing file, one that is not Parquet, and a missing column (naming all).
    """
    import pyarrow
    import pyarrow.parquet

    if not path.exists():
        raise PatterningError(f"{path}: no such file; expected a Parquet table")
    try:
        table = pyarrow.parquet.read_table(path, memory_map=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise PatterningError(f"{path}: not a readable Parquet file ({first_line(error)}); write it again") from None
    require_columns(path, table.column_names, columns)
    header = (table.schema.metadata or {}).get(METADATA_KEY)
    return table, json.loads(header) if header else {}


def parquet_file(path: Path) -> pyarrow.parquet.ParquetFile:
    """An open Parquet file, to be read a few rows at a time. Raises PatterningError where it is none."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise PatterningError(f"{path}: not a readable Parquet file ({first_line(error)})") from None


def require_columns(path: Path | str, present: Iterable[str], required: Iterable[str]) -> None:
    """Raises PatterningError for the first required column that is missing, naming those there, or is there twice."""
    present = list(present)
    for column in required:
        if column not in present:
            raise PatterningError(f"{path}: no column {column!r}; the columns there are {', '.join(present)}")
        if (times := present.count(column)) > 1:
            raise PatterningError(f"{path}: column {column!r} is there {times} times; leave one of them")


def token_dtype(vocabulary_size: int) -> str:
    """How ids are stored in a token table: 16 bits, or 32 where the vocabulary is larger than that."""
    return "<u2" if vocabulary_size <= 2**16 else "<i4"


class FileHashes:
    """Hashes of files' contents; a file of the same size and time as before is not read again.

    Args:
        known: path -> [size, time, hash], of an earlier run.
    """

    def __init__(self, known: Mapping[str, list[Any]]) -> None:
        self._before, self.known = dict(known), dict[str, list[Any]]()

    def __call__(self, file: Path) -> str:
        stamp = [file.stat().st_size, file.stat().st_mtime_ns]
        before = self.known.get(str(file)) or self._before.get(str(file)) or []
        self.known[str(file)] = before if before[:2] == stamp else [*stamp, file_sha256(file)]
        return self.known[str(file)][2]
