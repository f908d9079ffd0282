"""Where the training samples of a corpus come from: file, row and characters of every stretch of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from patterning_dist.storage.files import read_parquet, write_parquet


class Spans(NamedTuple):
    """Stretches of one document each, in the order of sequences and positions.

    Attributes:
        sequence: number of the sequence [span].
        position: of its first token there [span].
        document: number of the document [span].
        start, end: its characters, the last one excluded [span]. Characters count in the text as it was read.
    """

    sequence: np.ndarray
    position: np.ndarray
    document: np.ndarray
    start: np.ndarray
    end: np.ndarray

    @classmethod
    def of_piece(
        cls, document: int, starts: np.ndarray, ends: np.ndarray, num_before: int, context_length: int
    ) -> Spans:
        """Of text whose tokens lie end to end with others, cut into sequences.

        Args:
            document: number of the text.
            starts, ends: characters of its tokens [token].
            num_before: tokens that lie before them.
            context_length: of a sequence [tokens].
        """
        first = np.unique(np.append(0, np.arange(-num_before % context_length, len(starts), context_length)))
        last = np.append(first[1:], len(starts)) - 1
        sequence, position = np.divmod(num_before + first, context_length)
        return cls(sequence, position, np.full(len(first), document), starts[first], ends[last])

    @classmethod
    def joined(cls, parts: Sequence[Spans]) -> Spans:
        """One after another."""
        if not parts:
            return cls(*np.empty((5, 0), np.int64))
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def numbered(self, first: int, num_sequences: int) -> Spans:
        """Those of the first ``num_sequences`` sequences, which are numbered from ``first``."""
        kept = self._where(self.sequence < num_sequences)
        return kept._replace(sequence=kept.sequence + first)

    def of_sequences(self, order: np.ndarray) -> Spans:
        """Those of the sequences ``order``, which are numbered anew in that order."""
        number = np.full(1 + int(self.sequence.max(initial=-1)), -1)
        number[order] = np.arange(len(order))
        kept = self._replace(sequence=number[self.sequence])._where(number[self.sequence] >= 0)
        return kept._where(np.lexsort((kept.position, kept.sequence)))

    def first_documents(self) -> np.ndarray:
        """The document that every sequence begins in [sequence]."""
        return self.document[self.position == 0]

    def _where(self, which: np.ndarray) -> Spans:
        return Spans(*(column[which] for column in self))


def write_spans(path: Path, spans: Spans, origins: Sequence[tuple[str, int | None]]) -> None:
    """Write a row a span: sequence_id, position, document, file, row (null: the whole file), start and end.

    Args:
        path: of the Parquet file.
        spans: of the sequences of a token table.
        origins: file and row of every document.
    """
    files = pa.array([file for file, _ in origins], pa.string()).dictionary_encode()
    rows = pa.array([row for _, row in origins], pa.int64())
    document = pa.array(spans.document)
    table = {
        "sequence_id": pa.array(spans.sequence),
        "position": pa.array(spans.position),
        "document": document,
        "file": files.take(document),
        "row": rows.take(document),
        "start": pa.array(spans.start),
        "end": pa.array(spans.end),
    }
    write_parquet(path, pa.table(table), {"units": {"start": "characters", "end": "characters"}}, compression="zstd")


def read_spans(path: Path) -> pa.Table:
    """The table that ``write_spans`` wrote."""
    return read_parquet(path, ["sequence_id", "position", "document", "file", "row", "start", "end"])[0]
