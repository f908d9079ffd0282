"""Token ids in blocks of one length, addressed by number: this project's own tables, and everybody's.

A row is a list of token ids, or text that gives one (``text_rows``). One that is longer than a block gives as many
whole blocks as fit, and what is left of it is left out; a shorter one is padded. Blocks never run over the end of a
row. ``token_blocks`` says what does not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from patterning_dist.data.text_rows import RowTokenizer, known_columns
from patterning_dist.data.token_blocks import MASKS, Blocks, check_vocabulary, cut
from patterning_dist.data.token_rows import DOCUMENT, Rows, find_rows, is_list, unused_columns
from patterning_dist.errors import PatterningError
from patterning_dist.storage.files import token_dtype, write_parquet

if TYPE_CHECKING:
    from torch import Tensor

    Batch = Tensor | dict[str, Tensor]


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

    Raises PatterningError for a token that is not of the vocabulary.
    """
    tokens = np.asarray(tokens)
    num_sequences, context_length = tokens.shape
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocabulary_size):
        raise PatterningError(
            f"{path}: token ids {tokens.min()} to {tokens.max()}; expected 0 to {vocabulary_size - 1}"
        )
    # Binary of fixed size: lists of fixed size take an order of magnitude longer to read.
    stored = tokens.astype(token_dtype(vocabulary_size))
    cells = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(stored.itemsize * context_length), num_sequences, [None, pa.py_buffer(stored.tobytes())]
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


_PIECE = 2**20  # tokens of a corpus end to end that are cut at once


class TokenDataset:
    """Blocks of ``context_length`` tokens; two bytes a token in memory, four above id 65535.

    Pickles as its path: another process reads the data itself.

    Attributes:
        num_sequences: blocks.
        domains: object [block]; the row's ``domain`` where there is such a column, else the stem of the file.
        documents: int64 [block]; the row's ``document`` where there is such a column, else every row is one.
        metadata: header of this project's tables, else empty.
        vocabulary_size: where the header or the tokenizer of its text says it, else None.
        origins: object [block, 2]; file and number of the row.
        num_dropped: rows that have no token to predict.
        num_dropped_tokens: their tokens, and those behind the last whole block of rows that are cut.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("mine.jsonl").write_text('{"input_ids": [5, 6, 7, 8, 9]}')
        >>> data = TokenDataset("mine.jsonl", context_length=2)  # in blocks of two, each of which predicts one
        >>> len(data), data.num_dropped_tokens
        (2, 1)
    """

    def __init__(
        self,
        path: Path | str,
        context_length: int | None = None,
        column: str | None = None,
        pad: int | None = None,
        *,
        prompt: str | None = None,
        tokenizer: str | None = None,
    ) -> None:
        """Read all rows.

        Args:
            path: see ``find_rows``.
            context_length: length of a block [tokens]; None: that of a token table of this project.
            column: of token ids, text or messages; None: see ``text_rows.known_columns``.
            pad: token that fills rows up where no ``attention_mask`` says so.
            prompt: column of what stands before and carries no loss.
            tokenizer: of text, see ``RowTokenizer``.

        Raises:
            PatterningError: what ``find_rows``, ``RowTokenizer`` and ``token_blocks.cut`` refuse, or no row has a token
                to predict.
        """
        if context_length is not None and context_length < 2:
            raise PatterningError(
                f"{path}: context length {context_length}; expected 2 or more, to have a token to predict"
            )
        self.path = Path(path)
        self._arguments = (str(path), context_length, column, pad, prompt, tokenizer)
        self._name, encode = str(path), RowTokenizer(tokenizer)
        self.metadata: Mapping[str, Any] = {}
        parts: list[Blocks] = []
        origins, domains, documents = [], [], []
        unused: dict[str, None] = {}
        self.num_dropped = num_tokens = num_rows = 0
        names = [column or "input_ids"]
        for rows in find_rows(self._name, lambda _, there: known_columns(there, column, prompt), (*MASKS, DOCUMENT)):
            if rows.own is not None:
                self.metadata, names = rows.own, ["tokens"]
            else:
                names = known_columns(list(rows.columns), column, prompt)
                rows = encode(rows, names[-1], names[0] if len(names) == 2 else None, pad)
            context_length = context_length or self.metadata.get("context_length")
            if context_length is None:
                raise PatterningError(f"{path}: no token table of this project; say the context length of its blocks")
            unused |= dict.fromkeys((*rows.unused, *_no_masks(rows)))
            for piece in pieces(rows, names[-1], context_length):
                blocks = cut(piece, context_length, names[-1], pad)
                parts.append(blocks)
                origins.append(piece.origins(blocks.row))
                domains.append(piece.domain_names()[blocks.row])
                documents.append(num_rows + blocks.row)
                num_rows += len(piece)
                if (named := piece.documents()) is not None:
                    documents[-1] = named[blocks.row]
                self.num_dropped += len(piece) - len(np.unique(blocks.row))
                num_tokens += blocks.num_tokens
        self.column = names[-1]
        self.num_sequences = sum(len(part.row) for part in parts)
        if not self.num_sequences or context_length is None:
            raise PatterningError(
                f"{path}: {self.num_dropped or 'no'} rows in column {self.column!r}, none with a token to predict; "
                "expected rows of two tokens or more"
            )
        self.context_length = int(context_length)
        self._join(parts)
        self.origins = np.concatenate(origins)
        self.domains: np.ndarray = np.concatenate(domains)
        self.documents: np.ndarray = np.concatenate(documents)
        if self.documents.dtype.kind not in "iu":  # names
            self.documents = np.unique(self.documents.astype(str), return_inverse=True)[1]
        self.vocabulary_size: int | None = self.metadata.get("vocabulary_size", encode.vocabulary_size)
        self.num_dropped_tokens = num_tokens - sum(int(part.length.sum()) for part in parts)
        self._said = [f"{self._name}: {line}" for line in sorted(encode.used)] + unused_columns(self._name, unused)

    def _join(self, parts: Sequence[Blocks]) -> None:
        """Masks are kept where they say something anywhere in the table."""
        length = self.context_length
        self._blocks = np.concatenate([part.tokens for part in parts])
        self._counted = _joined([part.counted for part in parts], parts, np.ones(length - 1, bool))
        self._positions = _joined([part.positions for part in parts], parts, np.arange(length, dtype=np.int32))

    def __len__(self) -> int:
        return self.num_sequences

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, self._arguments

    def __getitem__(self, ids: Any) -> Batch:
        """Blocks by number (an array, tensor or list): int64 token ids [sample, position].

        Where something does not count anywhere in the table, a dict with ``tokens``, ``counted`` bool
        [sample, position - 1] and, where blocks are packed, ``position_ids`` that begin at 0 in every document.
        """
        import torch

        tokens = torch.from_numpy(self.tokens(ids))
        if self._counted is None:
            return tokens
        batch = {"tokens": tokens, "counted": torch.from_numpy(self._counted[np.asarray(ids)])}
        if (positions := self.positions(ids)) is not None:
            batch["position_ids"] = torch.from_numpy(positions.astype(np.int64))
        return batch

    def positions(self, ids: Any) -> np.ndarray | None:
        """Positions from 0 in every document of a packed block [sample, position]; None: no block is packed."""
        return None if self._positions is None else self._positions[np.asarray(ids, dtype=np.int64)]

    def counted(self, ids: Any) -> np.ndarray | None:
        """Which predicted tokens count, bool [sample, position - 1]; None: all of the table."""
        return None if self._counted is None else self._counted[np.asarray(ids, dtype=np.int64)]

    @property
    def mean_counted(self) -> float | None:
        """Predicted tokens of a block that count, on average; None: all."""
        return None if self._counted is None else float(self._counted.sum() / len(self._counted))

    def tokens(self, ids: Any) -> np.ndarray:
        """int64 [sample, position]. Raises PatterningError for a number outside 0 .. num_sequences - 1."""
        ids = np.asarray(ids, dtype=np.int64)
        outside = (ids < 0) | (ids >= self.num_sequences)
        if outside.any():
            raise PatterningError(
                f"{self._name}: no sequence {ids[outside][0]}; expected ids from 0 to {self.num_sequences - 1}"
            )
        return self._blocks[ids].astype(np.int64)

    def document_tokens(self, ids: Any) -> np.ndarray:
        """``tokens`` with the ids of every document of a packed block apart, so that no bigram is found in another."""
        tokens = self.tokens(ids)
        if self._positions is None:
            return tokens
        return tokens + (1 + self.max_token) * (self._positions[np.asarray(ids)] == 0).cumsum(axis=1)

    def check_vocabulary(self, vocabulary_size: int) -> None:
        """Raises PatterningError, naming file and row, for a token that a model of this vocabulary does not have."""
        check_vocabulary(self._blocks, self.origins, self.column, vocabulary_size)

    @property
    def max_token(self) -> int:
        """The largest token id."""
        return int(self._blocks.max())

    @property
    def remarks(self) -> list[str]:
        """Sentences about how rows were read, what is not used of them, and columns that have no effect."""
        if not self.num_dropped_tokens and not self.num_dropped:
            return self._said
        return [
            *self._said,
            f"{self._name}: {self.num_dropped_tokens} tokens are left out: those of {self.num_dropped} rows without a "
            f"token to predict, and what is over of rows longer than a multiple of {self.context_length}",
        ]

    @cached_property
    def sha256(self) -> str:
        """Hash of the blocks, their domains and masks, the same from whatever files they came."""
        digest = hashlib.sha256(f"{self.context_length}\n".encode())
        digest.update(np.ascontiguousarray(self._blocks, dtype="<i4").data)
        digest.update("\0".join(self.domains).encode())
        if not self.metadata:  # whose documents follow from the blocks
            digest.update(np.ascontiguousarray(np.unique(self.documents, return_inverse=True)[1], dtype="<i8").data)
        for mask in (self._counted, self._positions):
            if mask is not None:
                digest.update(np.ascontiguousarray(mask).data)
        return digest.hexdigest()


def _joined(masks: Sequence[np.ndarray | None], parts: Sequence[Blocks], plain: np.ndarray) -> np.ndarray | None:
    """Masks end to end, ``plain`` for every block of a part without; None where no part has any."""
    if all(mask is None for mask in masks):
        return None
    return np.concatenate(
        [
            np.broadcast_to(plain, (len(part.row), len(plain))) if mask is None else mask
            for mask, part in zip(masks, parts, strict=True)
        ]
    )


def _opened(
    path: str,
    context_length: int | None,
    column: str | None,
    pad: int | None,
    prompt: str | None,
    tokenizer: str | None,
) -> TokenDataset:
    return TokenDataset(path, context_length, column, pad, prompt=prompt, tokenizer=tokenizer)


def _no_masks(rows: Rows) -> list[str]:
    """A column ``labels`` of single numbers, a class, has no effect."""
    return [name for name in MASKS if name in rows.columns and not is_list(rows.columns[name])]


def pieces(rows: Rows, column: str, context_length: int) -> Iterator[Rows]:
    """Rows of one row of millions of tokens, a corpus end to end, as several: masks take ten times their memory."""
    length = len(rows.columns[column][0]) if len(rows) == 1 and is_list(rows.columns[column]) else 0
    size = _PIECE // context_length * context_length
    if not length or length < 2 * size or set(rows.columns) != {column}:
        yield rows
        return
    tokens = rows.columns[column].values
    starts = list(range(0, length - size + 1, size))
    for start, stop in zip(starts, [*starts[1:], length], strict=True):
        part = pa.LargeListArray.from_arrays(np.array([0, stop - start]), tokens[start:stop])
        yield Rows(rows.file, rows.first, {column: part}, rows.unused)
