"""Token ids that somebody else made, cut into blocks of one length: Parquet, this project's token tables, ``datasets``.

A row is a list of token ids. It gives as many whole blocks as it is long; what is left of it, and rows shorter than a
block, are left out and counted. Blocks never run over the end of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from patterning_dist.data.token_rows import Rows, find_rows
from patterning_dist.errors import PatterningError

if TYPE_CHECKING:
    from torch import Tensor


class TokenBlocks:
    """Blocks of ``context_length`` tokens, addressed by number; two bytes a token in memory, four above id 65535.

    Pickles as its path: another process reads the data itself.

    Attributes:
        num_sequences: blocks.
        domains: object [block]; the row's ``domain`` where there is such a column, else the stem of the file.
        num_dropped: rows shorter than a block.
        num_dropped_tokens: their tokens, and those behind the last whole block of the other rows.
    """

    def __init__(self, path: str, context_length: int, column: str, rows: Iterator[Rows]) -> None:
        """Read all ``rows``; ``load_tokens`` finds them.

        Raises:
            PatterningError: a null, an id that is no token, or not a single row as long as a block.
        """
        self.path, self.context_length, self.column = path, context_length, column
        self.num_dropped = self.num_dropped_tokens = 0
        blocks, domains, origins, lengths = [], [], [], []
        self._files: list[Path | str] = []
        for part in rows:
            if not self._files or self._files[-1] != part.file:
                self._files.append(part.file)
            ids, row, length = _cut(part, context_length, column)
            self.num_dropped += int((length < context_length).sum())
            self.num_dropped_tokens += int(length.sum()) - ids.size
            blocks.append(ids)
            origins.append(np.stack([np.full(len(row), len(self._files) - 1), row + part.first]))
            domains.append(part.domain_names()[row])
            lengths.append(length)
        self._blocks = np.concatenate(blocks) if blocks else np.empty((0, context_length), np.uint16)
        self.num_sequences = len(self._blocks)
        if not self.num_sequences:
            length = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
            there = f"{len(length)} rows of {length.min()} to {length.max()} tokens" if len(length) else "no rows"
            raise PatterningError(
                f"{path}: {there} in column {column!r}, none as long as a block of {context_length} tokens; "
                "lower the context length, or join short texts to longer rows"
            )
        self._origins = np.concatenate(origins, axis=1)
        self.domains: np.ndarray = np.concatenate(domains)

    def __len__(self) -> int:
        return self.num_sequences

    def __reduce__(self) -> tuple[Any, tuple[str, int, str]]:
        return load_tokens, (self.path, self.context_length, self.column)

    def __getitem__(self, ids: Any) -> Tensor:
        """int64 tensor [sample, position] of blocks by number (an array, tensor or list)."""
        import torch

        return torch.from_numpy(self.tokens(ids))

    def tokens(self, ids: Any) -> np.ndarray:
        """int64 [sample, position]. Raises PatterningError for a number outside 0 .. num_sequences - 1."""
        ids = np.asarray(ids, dtype=np.int64)
        outside = (ids < 0) | (ids >= self.num_sequences)
        if outside.any():
            raise PatterningError(
                f"{self.path}: no sequence {ids[outside][0]}; expected ids from 0 to {self.num_sequences - 1}"
            )
        return self._blocks[ids].astype(np.int64)

    def check_vocabulary(self, vocabulary_size: int) -> None:
        """Raises PatterningError, naming file and row, for a token that a model of this vocabulary does not have."""
        above = (self._blocks >= vocabulary_size).any(axis=1)
        if above.any():
            block = int(above.argmax())
            file, row = self._origins[:, block]
            raise PatterningError(
                f"{self._files[file]} row {row}: token {self._blocks[block].max()} in column {self.column!r}, and the "
                f"model's vocabulary ends at {vocabulary_size - 1}; tokenise the text with the model's own tokenizer"
            )

    @cached_property
    def sha256(self) -> str:
        """Hash of the blocks and their domains, the same from whatever files they came."""
        digest = hashlib.sha256(f"{self.context_length}\n".encode())
        digest.update(np.ascontiguousarray(self._blocks, dtype="<i4").data)
        digest.update("\0".join(self.domains).encode())
        return digest.hexdigest()


def load_tokens(path: str | Path, context_length: int, column: str = "input_ids") -> TokenBlocks:
    """Tokenised data as blocks.

    Args:
        path: a Parquet file or a folder of them, with a column of lists of integers; a token table of this project; the
            folder of a ``datasets`` dataset saved to disk; or the name of one on the hub, ``owner/name`` or
            ``owner/name:split``.
        context_length: length of a block [tokens].
        column: of the token ids; not used for a token table.

    Raises:
        PatterningError: nothing there, several splits and none chosen, no such column or not one of lists of integers,
            and what ``TokenBlocks`` refuses.
    """
    if context_length < 2:
        raise PatterningError(
            f"{path}: context length {context_length}; expected 2 or more, to have a token to predict"
        )
    return TokenBlocks(str(path), context_length, column, find_rows(str(path), column))


def _cut(part: Rows, context_length: int, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks [block, position], the row of each, and the length of every row."""
    lists = part.lists
    if lists.null_count:
        missing = int(np.argmax(lists.is_null().to_numpy(zero_copy_only=False)))
        raise PatterningError(
            f"{part.file} row {part.first + missing}: {column} is null; give token ids or leave the row out"
        )
    if pa.types.is_fixed_size_list(lists.type):
        lists = lists.cast(pa.list_(lists.type.value_type))
    offsets = lists.offsets.to_numpy().astype(np.int64)
    start, stop = int(offsets[0]), int(offsets[-1])
    values, offsets = lists.values[start:stop], offsets - start

    def refuse(bad: np.ndarray, what: str) -> None:
        if bad.any():
            row = int(np.searchsorted(offsets, int(bad.argmax()), side="right")) - 1
            raise PatterningError(f"{part.file} row {part.first + row}: {column} holds {what}; mend that row")

    if values.null_count:
        refuse(values.is_null().to_numpy(zero_copy_only=False), "a null")
    ids = values.to_numpy()
    refuse(ids < 0, "a negative number, which is no token")
    refuse(ids > np.iinfo(np.int32).max, "a number above 2147483647, which is no token")
    length = np.diff(offsets)
    per_row = length // context_length
    row = np.repeat(np.arange(len(length)), per_row)
    rank = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    starts = offsets[row] + rank * context_length
    ids = ids.astype(np.uint16 if not len(ids) or ids.max() < 2**16 else np.int32)
    return ids[starts[:, None] + np.arange(context_length)], row, length
