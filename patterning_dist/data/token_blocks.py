"""Rows of tokens cut into blocks, and which of their tokens count.

Columns beside the token ids, each a list as long, by the names that ``transformers`` and its trainers give them:

    attention_mask            0: a pad, at either end of the row; numbers above 1 are documents of a packed row
    labels                    -100: not predicted; else the token itself
    completion_mask,
    assistant_masks           0: not predicted
    segment_ids, seq_idx      documents of a packed row; a segment 0 after others, or below 0, is a pad
    position_ids              every document of a packed row begins at 0

Pads are cut off, so that a row gives the same block on whatever side it was padded. The first token of a document is
not predicted from the one before.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from patterning_dist.data.token_rows import Rows
from patterning_dist.errors import PatterningError

COMPLETION_MASK = "completion_mask"
_PREDICTED = (COMPLETION_MASK, "assistant_masks")
MASKS = ("attention_mask", "labels", "segment_ids", "seq_idx", "position_ids", *_PREDICTED)
_IGNORED = -100  # of torch.nn.functional.cross_entropy


class Blocks(NamedTuple):
    """Blocks of some rows.

    Attributes:
        tokens: [block, position], 0 behind the end of the row.
        row: [block], ascending.
        length: [block], tokens that are not pads.
        counted: bool [block, position - 1], of predicted tokens; None where all count.
        positions: int32 [block, position] in the document; None where no block holds several.
        num_tokens: of all rows, without pads.
    """

    tokens: np.ndarray
    row: np.ndarray
    length: np.ndarray
    counted: np.ndarray | None
    positions: np.ndarray | None
    num_tokens: int


def cut(rows: Rows, context_length: int, column: str, pad: int | None) -> Blocks:
    """Blocks of ``context_length`` tokens; those in which nothing counts are left out.

    Args:
        pad: token that fills rows up where there is no attention_mask.

    Raises:
        PatterningError: a null or a number that is no token; a mask of another length than its row; pads between
            tokens; a label that is another token; a document that does not begin at position 0.
    """
    ids, offsets, counts, starts = without_pads(rows, column, pad)
    ids = ids.astype(np.uint16 if not len(ids) or ids.max() < 2**16 else np.int32)
    num_tokens = np.diff(offsets)
    per_row = np.where(num_tokens < context_length, num_tokens > 1, num_tokens // context_length)
    row = np.repeat(np.arange(len(num_tokens)), per_row)
    rank = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    length = np.minimum(num_tokens[row], context_length)
    position = np.arange(context_length)
    inside = position < length[:, None]
    entry = np.where(inside, (offsets[row] + rank * context_length)[:, None] + position, 0)
    tokens = np.where(inside, ids[entry], 0)
    begins = starts[entry] & inside if starts is not None else np.zeros(tokens.shape, bool)
    begins[:, 0] = False
    counted = inside & ~begins
    if counts is not None:
        counted &= counts[entry]
    counted = counted[:, 1:]
    kept = counted.any(axis=1)
    positions = None
    if begins[kept].any():
        positions = (position - np.maximum.accumulate(position * begins, axis=1)).astype(np.int32)[kept]
    whole = bool(counted[kept].all())
    return Blocks(tokens[kept], row[kept], length[kept], None if whole else counted[kept], positions, len(ids))


def without_pads(
    rows: Rows, column: str, pad: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Token ids end to end, where rows begin, which are predicted (None: all), where documents begin (None: rows)."""
    ids, offsets = rows.token_ids(column)
    row = np.repeat(np.arange(len(rows)), np.diff(offsets))
    masks = {name: _beside(rows, name, column, offsets) for name in MASKS if _is_list(rows, name)}
    attention, labels = masks.get("attention_mask"), masks.get("labels")
    documents = [masks[name] for name in ("segment_ids", "seq_idx") if name in masks]
    if attention is not None and (attention > 1).any():
        documents.append(attention)
    keep = np.ones(len(ids), bool) if attention is None else attention != 0
    for segments in documents:
        first = segments[np.minimum(offsets[:-1], max(len(ids) - 1, 0))][row] if len(ids) else segments
        keep &= (segments >= 0) & ((segments > 0) | (first <= 0))
    spanned = _spans(keep, row)
    rows.refuse_entry(spanned & ~keep, offsets, f"{column} has pads between its tokens; expected them at the ends")
    if pad is not None and attention is None:
        keep &= _spans(keep & (ids != pad), row)
    begins = None
    if documents or "position_ids" in masks:
        begins = np.zeros(len(ids), bool)
        for segments in documents:
            begins[1:] |= segments[1:] != segments[:-1]
        if (positions := masks.get("position_ids")) is not None:
            begins[1:] |= positions[1:] != positions[:-1] + 1
            begins[offsets[:-1][np.diff(offsets) > 0]] = True
            wrong = begins & keep & (positions != 0)
            rows.refuse_entry(wrong, offsets, "a document begins at another position_ids than 0; count from there")
    if labels is not None:
        wrong = keep & (labels != _IGNORED) & (labels != ids)
        what = f"labels hold another token than {column}; expected the same one, not shifted, or {_IGNORED}"
        rows.refuse_entry(wrong, offsets, what)
    predicted = [masks[name] != 0 for name in _PREDICTED if name in masks]
    predicted += [] if labels is None else [labels != _IGNORED]
    counts = np.logical_and.reduce(predicted) if predicted else None
    if keep.all():
        return ids, offsets, counts, begins
    length = np.bincount(row[keep], minlength=len(rows))
    return (
        ids[keep],
        np.concatenate([[0], np.cumsum(length)]),
        None if counts is None else counts[keep],
        None if begins is None else begins[keep],
    )


def check_vocabulary(tokens: np.ndarray, origins: np.ndarray, column: str, vocabulary_size: int) -> None:
    """Raises PatterningError, naming file and row, for a token that a model of this vocabulary does not have.

    Args:
        tokens: [sample, position].
        origins: object [sample, 2], file and row.
    """
    above = (tokens >= vocabulary_size).any(axis=1)
    if above.any():
        sample = int(above.argmax())
        file, row = origins[sample]
        raise PatterningError(
            f"{file} row {row}: token {tokens[sample].max()} in column {column!r}, and the model's vocabulary ends at "
            f"{vocabulary_size - 1}; tokenise the text with the model's own tokenizer"
        )


def _is_list(rows: Rows, name: str) -> bool:
    """A column ``labels`` of single numbers, a class, is no mask."""
    return name in rows.columns and hasattr(rows.columns[name], "values")


def _beside(rows: Rows, name: str, column: str, offsets: np.ndarray) -> np.ndarray:
    values, others = rows.lists(name)
    rows.refuse(np.diff(others) != np.diff(offsets), f"{name} is not as long as {column}; expected a number a token")
    return values.astype(np.int64)


def _spans(keep: np.ndarray, row: np.ndarray) -> np.ndarray:
    """True from the first to the last True of every row."""
    entries = np.flatnonzero(keep)
    _, first, num = np.unique(row[entries], return_index=True, return_counts=True)
    spanned = np.zeros(len(keep) + 1, np.int64)
    spanned[entries[first]] += 1
    spanned[entries[first + num - 1] + 1] -= 1
    return spanned[:-1].cumsum() > 0
