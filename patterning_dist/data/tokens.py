"""Fixed blocks of tokens addressed by id: a Parquet table of 16-bit tokens, and the reader over it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from patterning_dist.data.tokenizer import MAX_VOCABULARY
from patterning_dist.errors import PatterningError
from patterning_dist.storage.files import read_parquet, write_parquet

if TYPE_CHECKING:
    from torch import Tensor


def write_token_table(
    path: Path,
    tokens: np.ndarray,
    domains: Sequence[str],
    documents: np.ndarray,
    *,
    vocabulary_size: int,
    tokenizer_sha256: str,
    split: str,
) -> None:
    """Write blocks [N, L] with their domain and document [N]; row number = sequence_id.

    Raises PatterningError when a token cannot be stored: a vocabulary above 65535, an id outside it.
    """
    tokens = np.asarray(tokens)
    num_sequences, context_length = tokens.shape
    if vocabulary_size > MAX_VOCABULARY:
        raise PatterningError(
            f"{path}: vocabulary of {vocabulary_size} tokens; expected at most {MAX_VOCABULARY} "
            "(ids are stored in 16 bits); use a smaller tokenizer"
        )
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocabulary_size):
        raise PatterningError(
            f"{path}: token ids {tokens.min()} to {tokens.max()}; expected 0 to {vocabulary_size - 1}"
        )
    # Binary of fixed size: lists of fixed size take an order of magnitude longer to read.
    cells = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(2 * context_length), num_sequences, [None, pa.py_buffer(tokens.astype("<u2").tobytes())]
    )
    table = pa.table(
        {
            "sequence_id": pa.array(np.arange(num_sequences, dtype=np.int64)),
            "domain": pa.array(list(domains), type=pa.string()).dictionary_encode(),
            "document": pa.array(np.asarray(documents, dtype=np.int64)),
            "tokens": cells,
        }
    )
    metadata = {
        "context_length": context_length,
        "vocabulary_size": vocabulary_size,
        "tokenizer_sha256": tokenizer_sha256,
        "split": split,
    }
    write_parquet(path, table, metadata, compression="none")


class TokenDataset:
    """Blocks of `context_length` tokens, addressed by sequence_id; about two bytes a token in memory.

    Pickles as its path, so that a dataset handed to another process is read there.
    """

    def __init__(self, path: Path) -> None:
        """Raises PatterningError for a file that is missing, unreadable or not a token table, naming it."""
        self.path = Path(path)
        table, self.metadata = read_parquet(self.path, ["sequence_id", "domain", "document", "tokens"])
        self.context_length = self._header("context_length")
        self.vocabulary_size = self._header("vocabulary_size")
        self.num_sequences = table.num_rows
        kind = table.schema.field("tokens").type
        if kind != pa.binary(2 * self.context_length):
            raise PatterningError(
                f"{self.path}: column 'tokens' holds {kind}; expected {2 * self.context_length} bytes a row"
            )
        if not np.array_equal(table["sequence_id"].to_numpy(), np.arange(self.num_sequences)):
            raise PatterningError(f"{self.path}: sequence_id is not the row number; write the table again")
        self._blocks = _as_array(table["tokens"].combine_chunks(), self.context_length)
        self.domains: np.ndarray = np.array(table["domain"].to_pylist(), dtype=object)
        self.documents: np.ndarray = table["document"].to_numpy()

    def __len__(self) -> int:
        return self.num_sequences

    def __reduce__(self) -> tuple[type[TokenDataset], tuple[Path]]:
        return TokenDataset, (self.path,)

    def __getitem__(self, ids: Any) -> Tensor:
        """int64 tensor [sample, position] of sequences by id (an array, tensor or list)."""
        import torch

        return torch.from_numpy(self.tokens(ids))

    def counted(self, ids: np.ndarray) -> None:
        """Every predicted token counts."""
        return None

    def tokens(self, ids: np.ndarray) -> np.ndarray:
        """int64 [len(ids), L]. Raises PatterningError for an id outside 0 .. num_sequences-1."""
        ids = np.asarray(ids, dtype=np.int64)
        outside = (ids < 0) | (ids >= self.num_sequences)
        if outside.any():
            raise PatterningError(
                f"{self.path}: no sequence {ids[outside][0]}; expected ids from 0 to {self.num_sequences - 1}"
            )
        return self._blocks[ids].astype(np.int64)

    @cached_property
    def sha256(self) -> str:
        """Hash of the file's content."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _header(self, key: str) -> Any:
        if key not in self.metadata:
            raise PatterningError(f"{self.path}: no {key!r} in the schema metadata; expected a token table")
        return self.metadata[key]


def _as_array(column: pa.Array | pa.ChunkedArray, context_length: int) -> np.ndarray:
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    size = 2 * context_length
    buffer = column.buffers()[1]
    if buffer is None:
        return np.empty((0, context_length), dtype="<u2")
    start = column.offset * size
    flat = np.frombuffer(buffer, dtype=np.uint8)[start : start + len(column) * size]
    return flat.view("<u2").reshape(len(column), context_length)
