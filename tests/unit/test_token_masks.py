"""Which tokens of a row count: a padded, labelled or packed table says the same as its rows one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from patterning_dist.data.tokens import TokenDataset
from patterning_dist.errors import PatterningError

ROWS = [[5, 6, 7], [8, 9], [1, 2, 3, 4], [3]]
PAD = 2  # also a token of the third row


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patterning_dist.data.row_files.ROWS_AT_ONCE", 3)


def read(path: Path, rows: list, length: int = 4, pad: int | None = None, **columns: list) -> TokenDataset:
    pq.write_table(pa.table({"input_ids": rows, **columns}), path / "t.parquet")
    return TokenDataset(path / "t.parquet", length, pad=pad)


def said(data: TokenDataset) -> list:
    ids = np.arange(len(data))
    batch = data[ids]
    return [batch[name].tolist() for name in batch]


@pytest.mark.parametrize("left", [False, True])
def test_pads_on_either_side_are_the_end_of_a_row(tmp_path: Path, left: bool) -> None:
    plain = read(tmp_path, ROWS)
    pads = [[PAD] * (4 - len(row)) for row in ROWS]
    padded = [p + r if left else r + p for r, p in zip(ROWS, pads, strict=True)]
    ones = [
        [0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p) for r, p in zip(ROWS, pads, strict=True)
    ]
    masked = read(tmp_path, padded, attention_mask=ones)
    assert said(masked) == said(plain)
    assert masked.sha256 == plain.sha256
    assert (masked.num_dropped, masked.num_dropped_tokens) == (1, 1)
    assert masked.counted(np.array([1])).tolist() == [[True, False, False]]
    # Without the mask, the token that fills rows up is known from the model.
    assert said(read(tmp_path, padded, pad=PAD)) == said(plain)


def test_pads_are_outside_the_vocabulary_and_of_no_domain_of_their_own(tmp_path: Path) -> None:
    data = read(tmp_path, [[1, 2, 99, 99], [3, 4, 5, 99]], pad=99, domain=["a", "b"])
    data.check_vocabulary(6)
    assert data.domains.tolist() == ["a", "b"]
    assert data.tokens([0]).tolist() == [[1, 2, 0, 0]]


def test_labels_take_tokens_out_of_the_losses_and_leave_them_in_the_context(tmp_path: Path) -> None:
    rows, labels = [[5, 6, 7, 8], [1, 2, 3, 4], [9, 9, 9, 9]], [[-100, -100, 7, 8], [1, 2, 3, -100], [-100] * 4]
    data = read(tmp_path, rows, labels=labels)
    assert data.tokens([0, 1]).tolist() == rows[:2]
    assert data.counted([0, 1]).tolist() == [[False, True, True], [True, True, False]]
    assert (data.num_sequences, data.num_dropped, data.num_dropped_tokens) == (2, 1, 4)


@pytest.mark.parametrize(
    "columns",
    [
        {"segment_ids": [[1, 1, 1, 2, 2, 0], [1, 2, 2, 3, 3, 3]]},
        {"seq_idx": [[0, 0, 0, 1, 1, -1], [0, 1, 1, 2, 2, 2]]},
        {"attention_mask": [[1, 1, 1, 2, 2, 0], [1, 2, 2, 3, 3, 3]]},
        {"position_ids": [[0, 1, 2, 0, 1, 0], [0, 0, 1, 0, 1, 2]], "attention_mask": [[1] * 5 + [0], [1] * 6]},
    ],
    ids=lambda columns: "+".join(columns),
)
def test_packed_documents_do_not_predict_each_other(tmp_path: Path, columns: dict) -> None:
    data = read(tmp_path, [[5, 6, 7, 8, 9, 0], [1, 2, 3, 1, 2, 3]], 6, **columns)
    tokens, counted, positions = said(data)
    assert tokens == [[5, 6, 7, 8, 9, 0], [1, 2, 3, 1, 2, 3]]
    assert counted == [[True, True, False, True, False], [False, True, False, True, True]]
    assert [row[:5] for row in positions] == [[0, 1, 2, 0, 1], [0, 0, 1, 0, 1]]
    # "2 3" comes twice in the second row, but in two documents.
    apart = data.document_tokens([1])[0]
    assert (apart[1], apart[2]) != (apart[4], apart[5])


def test_a_document_that_is_cut_begins_again_in_its_next_block(tmp_path: Path) -> None:
    data = read(tmp_path, [[1, 2, 3, 4, 5, 6]], 3, segment_ids=[[1, 2, 2, 2, 2, 3]])
    assert said(data) == [[[1, 2, 3], [4, 5, 6]], [[False, True], [True, False]], [[0, 0, 1], [0, 1, 0]]]


def test_one_document_a_row_is_not_packed(tmp_path: Path) -> None:
    data = read(tmp_path, [[1, 2, 3], [4, 5, 6]], 3, position_ids=[[0, 1, 2]] * 2, seq_idx=[[0] * 3, [1] * 3])
    assert data[[0]].tolist() == [[1, 2, 3]]


def test_a_class_is_no_mask(tmp_path: Path) -> None:
    assert read(tmp_path, [[1, 2, 3]], 3, labels=[1]).counted([0]) is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"attention_mask": [[1, 1, 1], [1, 0, 1]]}, "row 1: input_ids has pads between its tokens; expected them at"),
        (
            {"attention_mask": [[1, 1], [1, 1, 1]]},
            "row 0: attention_mask is not as long as input_ids; expected a",
        ),
        (
            {"labels": [[1, 2, 3], [5, 6, -100]]},
            "row 1: labels hold another token than input_ids; .* or -100",
        ),
        ({"position_ids": [[0, 1, 2], [0, 4, 5]]}, "row 1: a document begins at another position_ids than 0; count"),
        ({"labels": [[1, 2, 3], None]}, "row 1: labels is null"),
    ],
)
def test_masks_that_do_not_fit_are_named(tmp_path: Path, columns: dict, message: str) -> None:
    with pytest.raises(PatterningError, match=rf"t\.parquet {message}"):
        read(tmp_path, [[1, 2, 3], [4, 5, 6]], 3, **columns)
