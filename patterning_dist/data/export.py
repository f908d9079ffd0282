"""Training samples with their weights, as rows that other trainers read.

Of language models a row has ``input_ids``, ``labels`` (-100 where nothing is predicted) and ``token_weights`` beside
them, of the label at the same place, not shifted. Weights have mean 1 over the labels of all rows, so that the loss
whose minimum was looked for is

    sum_i rho_i l_i / (number of labels)

over a batch, l_i the cross-entropy of label i. ``weight`` is the mean of the row. Of pairs and classes a row has one
loss and one weight. ``text`` is there where the run has cut text itself. ``source`` says where the row comes from:
file, row, first character and the one after the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from patterning_dist.data.sequences import SequenceTable
from patterning_dist.data.sources import read_spans
from patterning_dist.data.tokens import TokenDataset

IGNORED = -100  # of torch.nn.functional.cross_entropy
SOURCE = pa.struct([("file", pa.string()), ("row", pa.int64()), ("start", pa.int64()), ("end", pa.int64())])
ROWS_AT_ONCE = 1024  # in memory


class Weighted(NamedTuple):
    """Samples and the weights of their losses, mean 1 over those that count.

    Attributes:
        samples: of the run.
        weights: [sample] or [sample, position].
        spans: of a corpus that was cut by stage prepare: what ``sources.read_spans`` returns.
        tokenizer: of that corpus.
    """

    samples: TokenDataset | SequenceTable
    weights: np.ndarray
    spans: pa.Table | None = None
    tokenizer: Tokenizer | None = None

    @classmethod
    def of(cls, samples: TokenDataset | SequenceTable, weights: np.ndarray, corpus: Path | None) -> Weighted:
        """Samples with weights rho, 0 where nothing counts.

        Args:
            samples: of the run.
            weights: [sample] or [sample, position].
            corpus: folder of stage prepare; None: the samples are tables of the user's own.
        """
        found = cls(samples, weights)
        scaled = weights / (weights.sum(dtype=np.float64) / found.num_counted().sum())
        found = found._replace(weights=scaled.astype(np.float32))
        if corpus is None:
            return found
        tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
        return found._replace(spans=read_spans(corpus / "sources.parquet"), tokenizer=tokenizer)

    def sample_weights(self) -> np.ndarray:
        """Mean weight of the losses of a sample that count [sample]."""
        return self.weights if self.weights.ndim == 1 else self.weights.sum(axis=1) / self.num_counted()

    def num_counted(self) -> np.ndarray:
        """Losses of a sample that count [sample]."""
        samples, ids = self.samples, np.arange(len(self.weights))
        counted = samples.counted(ids) if isinstance(samples, TokenDataset) else None
        if counted is not None:
            return counted.sum(axis=1)
        return np.full(len(self.weights), 1 if self.weights.ndim == 1 else self.weights.shape[1])

    def rows(self, copies: np.ndarray | None = None) -> Iterator[pa.Table]:
        """A row a sample, some at a time; with ``copies`` [sample] so many of each, and no weights."""
        for start in range(0, len(self.weights), ROWS_AT_ONCE):
            ids = np.arange(start, min(start + ROWS_AT_ONCE, len(self.weights)))
            table = pa.table(self._columns(ids))
            if copies is not None:
                unweighted = table.drop_columns([name for name in table.column_names if name.endswith("weights")])
                table = unweighted.drop_columns(["weight"]).take(np.repeat(ids - start, copies[ids]))
            yield table

    def _columns(self, ids: np.ndarray) -> dict[str, Any]:
        samples = self.samples
        columns = {"id": pa.array(ids), "domain": pa.array(samples.domains[ids].tolist(), pa.string())}
        if isinstance(samples, TokenDataset):
            columns |= _token_columns(samples, ids, self.weights[ids])
            if self.tokenizer is not None:
                cells = self.tokenizer.decode_batch(columns["input_ids"].to_pylist(), skip_special_tokens=False)
                columns["text"] = pa.array(cells, pa.string())
        else:
            columns |= _sequence_columns(samples, ids)
        columns["weight"] = pa.array(self.sample_weights()[ids], pa.float32())
        columns["source"] = self._sources(ids)
        return columns

    def _sources(self, ids: np.ndarray) -> pa.Array:
        if self.spans is None:
            cells = [[{"file": str(file), "row": int(row)}] for file, row in self.samples.origins[ids]]
            return pa.array(cells, pa.list_(SOURCE))
        first, stop = np.searchsorted(self.spans["sequence_id"].to_numpy(), [ids[0], ids[-1] + 1])
        part = self.spans.slice(first, stop - first)
        begins = np.append(np.searchsorted(part["sequence_id"].to_numpy(), ids), len(part))
        cells = pa.StructArray.from_arrays(
            [part[field.name].combine_chunks().cast(field.type) for field in SOURCE], fields=list(SOURCE)
        )
        return pa.ListArray.from_arrays(begins.astype(np.int32), cells)


def copies_of(weights: np.ndarray, mean: float, seed: int) -> np.ndarray:
    """How often a sample is repeated [sample]: whole numbers whose expectation is mean * weight.

    Systematic sampling: floor(c_i + u) - floor(c_{i-1} + u), c the running sum of what is expected, u uniform in
    [0, 1): no sample is more than one copy off, and the total is not either (Madow & Madow, 1944).

    Args:
        weights: mean 1 [sample].
        mean: copies of a sample of weight 1.
        seed: of u.

    Examples:
        >>> copies_of(np.array([0.5, 1.5]), mean=2, seed=0)  # expectations 1 and 3
        array([1, 3])
    """
    running = np.cumsum(weights.astype(np.float64)) * mean + np.random.default_rng(seed).random()
    return np.diff(np.floor(running), prepend=0.0).astype(np.int64)


def source_table(weighted: Weighted) -> pa.Table:
    """A row a document of a corpus, or a row of the user's table: file, row, losses that count, mean weight."""
    weights, samples = weighted.weights, weighted.samples
    if weighted.spans is None:
        origins = samples.origins
        keys, at = np.unique(np.array([f"{file}\0{row}" for file, row in origins]), return_inverse=True)
        first = np.full(len(keys), len(at))
        np.minimum.at(first, at, np.arange(len(at)))
        files, rows = [str(file) for file in origins[first, 0]], [int(row) for row in origins[first, 1]]
        number, total = weighted.num_counted(), weighted.sample_weights() * weighted.num_counted()
    else:
        # The loss at position p is that of token p + 1, which is in the span that begins last before it.
        spans, length = weighted.spans, weights.shape[1] + 1
        entry = spans["sequence_id"].to_numpy() * length + spans["position"].to_numpy()
        span = np.searchsorted(entry, np.arange(len(weights) * length), side="right") - 1
        predicted = span.reshape(-1, length)[:, 1:].ravel()
        documents, first, of_span = np.unique(spans["document"].to_numpy(), return_index=True, return_inverse=True)
        at, total = of_span[predicted], weights.ravel()
        number = np.ones(len(at), np.int64)
        files, rows = (spans[name].take(first).to_pylist() for name in ("file", "row"))
        keys = documents
    num = np.bincount(at, number, len(keys))
    mean = np.bincount(at, total, len(keys)) / np.maximum(num, 1)
    found = {"file": pa.array(files, pa.string()), "row": pa.array(rows, pa.int64())}
    return pa.table(found | {"num_losses": pa.array(num.astype(np.int64)), "weight": pa.array(mean)})


def _token_columns(samples: TokenDataset, ids: np.ndarray, weights: np.ndarray) -> dict[str, pa.Array]:
    """Tokens behind the last label are left out: nothing depends on them."""
    tokens, counted = samples.tokens(ids), samples.counted(ids)
    labels = np.full(tokens.shape, IGNORED)
    labels[:, 1:] = tokens[:, 1:] if counted is None else np.where(counted, tokens[:, 1:], IGNORED)
    beside = np.zeros(tokens.shape, np.float32)
    beside[:, 1:] = weights
    length = tokens.shape[1] - np.argmax(labels[:, ::-1] != IGNORED, axis=1)
    kept = np.arange(tokens.shape[1]) < length[:, None]
    found = {"input_ids": _lists(tokens, kept, pa.int32()), "labels": _lists(labels, kept, pa.int32())}
    if (positions := samples.positions(ids)) is not None:
        found["position_ids"] = _lists(positions, kept, pa.int32())
    return found | {"token_weights": _lists(beside, kept, pa.float32())}


def _sequence_columns(samples: SequenceTable, ids: np.ndarray) -> dict[str, pa.Array]:
    batch = samples[ids]
    found = {}
    for name in samples.columns:
        column = "input_ids" if name == "tokens" else f"{name}_input_ids"
        found[column] = _lists(batch[name].numpy(), batch[f"{name}_mask"].numpy(), pa.int32())
    if "label" in batch:
        found["label"] = pa.array(batch["label"].numpy())
    return found


def _lists(values: np.ndarray, kept: np.ndarray, kind: pa.DataType) -> pa.Array:
    offsets = np.append(0, np.cumsum(kept.sum(axis=1)))
    return pa.ListArray.from_arrays(offsets.astype(np.int32), pa.array(values[kept], kind))
