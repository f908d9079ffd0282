"""Whole sequences of token ids, one or several a sample, padded on the right to one length; perhaps with a class."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from patterning_dist.data.text_rows import RowTokenizer, mask_name, real_tokens
from patterning_dist.data.token_blocks import check_vocabulary
from patterning_dist.data.token_rows import DOCUMENT, Rows, find_rows, unused_columns
from patterning_dist.errors import PatterningError

if TYPE_CHECKING:
    from torch import Tensor


class SequenceTable:
    """Samples of a table of rows, addressed by number; four bytes a token in memory.

    Pickles as its path: another process reads the data itself.

    Attributes:
        domains: object [sample]; the row's ``domain`` where there is such a column, else the stem of the file.
        documents: int64 [sample]; the row's ``document``; in files without that column every row is one; None where no
            file has it.
        labels: int64 [sample]; None without a column of classes.
        lengths: name of a sequence -> its tokens that are not pads [sample].
        origins: object [sample, 2]; file and number of the row.
        num_dropped: rows left out, with a sequence longer than ``context_length`` or an empty one.
    """

    def __init__(
        self,
        path: str,
        context_length: int,
        columns: Mapping[str, str],
        prompt: str | None = None,
        label: str | None = None,
        pad: int | None = None,
        tokenizer: str | None = None,
    ) -> None:
        """Read all rows.

        Args:
            path: see ``find_rows``.
            context_length: of the longest sequence that is kept [tokens].
            columns: name of a sequence in a batch -> its column, of token ids, text or messages. Where that is called
                input_ids..., a column attention_mask... says which tokens are pads.
            prompt: column of what stands before every sequence of the row.
            label: column of classes, numbers from 0.
            pad: token that fills rows up where no attention_mask says so.
            tokenizer: of text, see ``RowTokenizer``.

        Raises:
            PatterningError: what ``find_rows`` and ``RowTokenizer`` refuse, a number that is no token or no class, or
                no row that fits.
        """
        self._arguments = path, context_length, dict(columns), prompt, label, pad, tokenizer
        self.path, self.context_length, self.columns = path, context_length, dict(columns)
        lists = [*columns.values(), *([prompt] if prompt else [])]
        others = [*(mask_name(column) for column in lists), *([label] if label else []), DOCUMENT]
        parts: list[tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray]] = []
        domains, documents, labels, origins = [], list[np.ndarray | None](), [], []
        encode, unused = RowTokenizer(tokenizer), dict[str, None]()
        for rows in find_rows(path, lambda *_: lists, others):
            if rows.own is not None:
                raise PatterningError(f"{rows.file}: a table of blocks of tokens; expected columns {', '.join(lists)}")
            sequences, fits = self._lay_out(rows, encode, prompt, pad)
            parts.append((sequences, fits))
            domains.append(rows.domain_names()[fits])
            documents.append(None if (named := rows.documents()) is None else named[fits])
            origins.append(rows.origins(np.flatnonzero(fits)))
            unused |= dict.fromkeys(rows.unused)
            if label:
                labels.append(_classes(rows, label)[fits])
        self.vocabulary_size = encode.vocabulary_size
        self._said = [f"{path}: {line}" for line in sorted(encode.used)] + unused_columns(path, unused)
        num_rows, num_fit = (sum(int(f(fits)) for _, fits in parts) for f in (len, np.sum))
        if not num_fit:
            raise PatterningError(
                f"{path}: {num_rows or 'no'} rows, none with sequences of 1 to {context_length} tokens; "
                "raise data.context_length"
            )
        self.num_dropped, self.origins = num_rows - num_fit, np.concatenate(origins)
        self._tokens = {name: np.concatenate([p[name][0][fits] for p, fits in parts]) for name in columns}
        self.lengths = {name: np.concatenate([p[name][1][fits] for p, fits in parts]) for name in columns}
        self.domains: np.ndarray = np.concatenate(domains)
        self.documents = _numbered(documents, [len(part) for part in domains])
        self.labels = np.concatenate(labels) if label else None

    def _lay_out(
        self, rows: Rows, encode: RowTokenizer, prompt: str | None, pad: int | None
    ) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray]:
        """Tokens [row, position] and lengths of every sequence, and the rows in which all of them fit."""
        found, fits = {}, np.ones(len(rows), bool)
        for name, column in self.columns.items():
            ids, offsets = real_tokens(encode(rows, column, prompt, pad, losses=False), column, pad)
            tokens = np.zeros((len(rows), self.context_length), np.int32)
            length = np.diff(offsets)
            row = np.repeat(np.arange(len(rows)), length)
            position = np.arange(len(ids)) - offsets[row]
            inside = position < self.context_length
            tokens[row[inside], position[inside]] = ids[inside]
            found[name] = tokens, length
            fits &= (length > 0) & (length <= self.context_length)
        return found, fits

    def __len__(self) -> int:
        return len(self.domains)

    def __reduce__(self) -> tuple[type[SequenceTable], tuple[Any, ...]]:
        return SequenceTable, self._arguments

    def __getitem__(self, ids: Any) -> dict[str, Tensor]:
        """Token ids [sample, position] by the name of the sequence, 0 behind the end; NAME_mask, bool; label [sample].

        Raises:
            PatterningError: a number outside 0 .. len - 1.
        """
        import torch

        ids = np.asarray(ids, dtype=np.int64)
        outside = (ids < 0) | (ids >= len(self))
        if outside.any():
            raise PatterningError(f"{self.path}: no sample {ids[outside][0]}; expected ids from 0 to {len(self) - 1}")
        batch = {}
        for name, tokens in self._tokens.items():
            batch[name] = torch.from_numpy(tokens[ids].astype(np.int64))
            batch[f"{name}_mask"] = torch.from_numpy(np.arange(self.context_length) < self.lengths[name][ids, None])
        if self.labels is not None:
            batch["label"] = torch.from_numpy(self.labels[ids])
        return batch

    def last_tokens(self) -> set[int]:
        """Token ids that some sequence ends with."""
        rows = np.arange(len(self))
        return {int(t) for name, ids in self._tokens.items() for t in np.unique(ids[rows, self.lengths[name] - 1])}

    @property
    def max_token(self) -> int:
        """The largest token id."""
        return max(int(tokens.max()) for tokens in self._tokens.values())

    def check_vocabulary(self, vocabulary_size: int) -> None:
        """Raises PatterningError, naming file and row, for a token that a model of this vocabulary does not have."""
        for name, tokens in self._tokens.items():
            check_vocabulary(tokens, self.origins, self.columns[name], vocabulary_size)

    @property
    def remarks(self) -> list[str]:
        """Sentences about how rows were read, rows that are not used, and columns that have no effect."""
        if not self.num_dropped:
            return self._said
        return [
            *self._said,
            f"{self.path}: {self.num_dropped} rows are left out, with a sequence of more than {self.context_length} "
            "tokens or of none",
        ]

    @cached_property
    def sha256(self) -> str:
        """Hash of sequences, classes, documents and domains, the same from whatever files they came."""
        digest = hashlib.sha256(f"{self.context_length}\n".encode())
        for name, tokens in self._tokens.items():
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(tokens, dtype="<i4").data)
            digest.update(np.ascontiguousarray(self.lengths[name], dtype="<i8").data)
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels, dtype="<i8").data)
        if self.documents is not None:
            digest.update(self.documents.astype("<i8").data)
        digest.update("\0".join(self.domains).encode())
        return digest.hexdigest()


def _numbered(parts: list[np.ndarray | None], sizes: list[int]) -> np.ndarray | None:
    """Numbers of documents, of parts that name them and parts of ``sizes`` in which every sample is one."""
    if all(part is None for part in parts):
        return None
    ends = np.cumsum(sizes)
    names = [
        np.char.add("\0", np.arange(end - size, end).astype(str)) if part is None else part.astype(str)
        for part, size, end in zip(parts, sizes, ends, strict=True)
    ]
    return np.unique(np.concatenate(names), return_inverse=True)[1]


def _classes(rows: Rows, label: str) -> np.ndarray:
    """int64 [row]."""
    import pyarrow as pa

    if label not in rows.columns:
        raise PatterningError(f"{rows.file}: no column {label!r}, the class of a row; name it in data.label")
    column = rows.columns[label]
    if not pa.types.is_integer(column.type):
        raise PatterningError(f"{rows.file}: column {label!r} holds {column.type}; expected whole numbers, the classes")
    nulls = column.is_null().to_numpy(zero_copy_only=False)
    rows.refuse(nulls, f"{label} is null; give a class or leave the row out")
    classes = column.to_numpy().astype(np.int64)
    rows.refuse(classes < 0, f"{label} is negative; classes are numbered from 0")
    return classes
