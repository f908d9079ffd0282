"""Rows of JSON, compressed or not: one object a line, or a list of objects."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from patterning_dist.errors import PatterningError, first_line

_COMPRESSED = (".gz", ".bz2", ".zst")
_MARK = b"\xef\xbb\xbf"  # the byte-order mark that some editors begin UTF-8 with


def kind_of(path: Path) -> str:
    """The suffix, in small letters, of compressed JSON that before: ``.jsonl`` of ``c4.jsonl.gz``."""
    kind, inner = path.suffix.lower(), Path(path.stem).suffix.lower()
    return inner if kind in _COMPRESSED and inner in (".jsonl", ".json") else kind


def stem_of(path: Path) -> str:
    """The name without what ``kind_of`` looks at."""
    return path.stem if kind_of(path) == path.suffix.lower() else Path(path.stem).stem


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number of the line (of the row, in a list) and the object there; blank lines are none.

    Raises:
        PatterningError: naming file and line: not JSON, or no object; bytes or text that are not UTF-8; a damaged
            compressed file.
    """
    offset = 0
    with io.BufferedReader(pa.input_stream(str(path), compression="detect")) as file:
        lines = _lines(file, path)
        first = next(lines, b"")
        if kind_of(path) == ".json" and first.removeprefix(_MARK).lstrip()[:1] == b"[":
            rows = _parse(decode(first + b"".join(lines), path), str(path), "a list of objects")
            for number, row in enumerate(rows):
                yield number, _object(row, f"{path} row {number}")
            return
        for number, line in enumerate(chain([first], lines), 1):
            text = decode(line, path, offset)
            offset += len(line)
            if text.strip():
                where = f"{path}:{number}"
                yield number, _object(_parse(text, where, "one object a line"), where)


def _lines(file: io.BufferedReader, path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except (OSError, pa.ArrowException) as error:
        raise PatterningError(f"{path}: cannot be read to its end ({first_line(error)}); copy it again") from None


def decode(content: bytes, path: Path, offset: int = 0) -> str:
    """UTF-8 as text, less a byte-order mark at the beginning of the file.

    Args:
        content: of the file, from ``offset``.

    Raises:
        PatterningError: bytes that are not UTF-8.
    """
    try:
        return content.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as error:
        where = offset + error.start + (not offset and content.startswith(_MARK)) * len(_MARK)
        raise PatterningError(
            f"{path}: byte {where} is not UTF-8; convert the file to UTF-8 (e.g. with iconv)"
        ) from None


def _parse(text: str, where: str, expected: str) -> Any:
    try:
        found = json.loads(text)
        if "\\u" in text:  # the one way to half a character in UTF-8
            json.dumps(found, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise PatterningError(f"{where}: not JSON ({error.msg}); expected {expected}") from None
    except RecursionError:
        raise PatterningError(f"{where}: JSON nested too deep to be read; expected {expected}") from None
    except UnicodeEncodeError as error:
        raise PatterningError(
            f"{where}: text with half of a surrogate pair (\\u{ord(error.object[error.start]):04x}), which is no "
            "character; mend that row"
        ) from None
    except ValueError:  # of integers of more than 4300 digits
        raise PatterningError(f"{where}: a number of too many digits to be read; mend that row") from None
    return found


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise PatterningError(f"{where}: not a JSON object; expected one object a line")
    return row
