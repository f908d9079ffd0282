"""Tokens of others: every source gives the same blocks, what is left out is counted, nothing odd passes in silence."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from patterning_dist.data.tokens import TokenDataset, write_token_table
from patterning_dist.errors import PatterningError

LENGTHS = [9, 3, 4, 1, 13]
ROWS = [list(range(10 * row, 10 * row + length)) for row, length in enumerate(LENGTHS)]
BLOCKS = [[0, 1, 2, 3], [4, 5, 6, 7], [10, 11, 12, 0], [20, 21, 22, 23]]
BLOCKS += [[40, 41, 42, 43], [44, 45, 46, 47], [48, 49, 50, 51]]


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches everywhere: rows are numbered and cut across them."""
    monkeypatch.setattr("patterning_dist.data.row_files.ROWS_AT_ONCE", 3)


def write(path: Path, rows: list, kind: pa.DataType | None = None, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"input_ids": pa.array(rows, kind or pa.list_(pa.int64())), **columns})
    pq.write_table(table, path, row_group_size=7)
    return path


def all_of(blocks: TokenDataset) -> list[list[int]]:
    return blocks.tokens(np.arange(len(blocks))).tolist()


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.uint16(), pa.int8()], ids=str)
@pytest.mark.parametrize("lists", [pa.list_, pa.large_list], ids=["list", "large_list"])
def test_rows_are_cut_into_blocks_and_the_rest_is_counted(tmp_path: Path, kind: pa.DataType, lists) -> None:
    blocks = TokenDataset(write(tmp_path / "text.parquet", ROWS, lists(kind)), 4)
    assert all_of(blocks) == BLOCKS
    assert (len(blocks), blocks.num_sequences, blocks.context_length) == (7, 7, 4)
    assert blocks.num_dropped == 1
    assert blocks.num_dropped_tokens == 3  # one of 9, the row of one, one of 13
    assert "t.parquet: 3 tokens are left out: those of 1 rows without a token to predict" in blocks.remarks[0]
    assert blocks.domains.tolist() == ["text"] * 7
    assert blocks.domains.dtype == object


def test_cutting_agrees_with_cutting_by_hand(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    rows = [random.integers(1, 70_000, length).tolist() for length in random.integers(0, 40, 3000)]
    blocks = TokenDataset(write(tmp_path / "t.parquet", rows), 7)
    cut = [row[i : i + 7] for row in rows for i in range(0, len(row), 7)]
    wanted = [
        block
        for block, whole in zip(cut, (len(r) for r in rows for _ in range(0, len(r), 7)), strict=True)
        if len(block) == 7 or 1 < whole < 7
    ]
    assert all_of(blocks) == [block + [0] * (7 - len(block)) for block in wanted]
    assert blocks.counted(np.arange(len(blocks))).sum(axis=1).tolist() == [len(block) - 1 for block in wanted]
    assert blocks.num_dropped == sum(len(row) < 2 for row in rows)
    assert blocks.num_dropped_tokens == sum(map(len, rows)) - sum(map(len, wanted))


def test_rows_that_fill_their_blocks_have_no_masks(tmp_path: Path) -> None:
    rows = [list(range(length)) for length in (9, 4, 13)]
    blocks = TokenDataset(write(tmp_path / "t.parquet", rows), 4)
    assert all_of(blocks) == [row[i : i + 4] for row in rows for i in range(0, len(row) - 3, 4)]
    assert blocks.counted(np.arange(6)) is None
    assert isinstance(blocks[[0]], torch.Tensor)


def test_lists_of_fixed_size_are_read(tmp_path: Path) -> None:
    rows = np.arange(30).reshape(5, 6).tolist()
    blocks = TokenDataset(write(tmp_path / "t.parquet", rows, pa.list_(pa.int32(), 6)), 3)
    assert all_of(blocks) == np.arange(30).reshape(10, 3).tolist()


def test_blocks_by_number_are_tensors_of_int64(tmp_path: Path) -> None:
    blocks = TokenDataset(write(tmp_path / "t.parquet", ROWS), 4)
    for ids in ([2, 0, 0], np.array([2, 0, 0]), torch.tensor([2, 0, 0])):
        assert blocks[ids]["tokens"].dtype == torch.int64
        assert blocks[ids]["tokens"].tolist() == [BLOCKS[2], BLOCKS[0], BLOCKS[0]]
        assert blocks[ids]["counted"].tolist() == [[True, True, False], [True] * 3, [True] * 3]
        assert blocks[ids].keys() == {"tokens", "counted"}
    assert blocks.tokens(np.array([2])).dtype == np.int64
    for bad in (-1, 7):
        with pytest.raises(PatterningError, match=rf"t\.parquet: no sequence {bad}; expected ids from 0 to 6"):
            blocks[np.array([0, bad])]


def test_large_ids_are_kept_and_small_ones_take_two_bytes(tmp_path: Path) -> None:
    small = TokenDataset(write(tmp_path / "small.parquet", [[65_535, 0]]), 2)
    mixed = TokenDataset(write(tmp_path / "mixed.parquet", [[1, 2], [3, 4], [151_935, 65_536]]), 2)
    assert small._blocks.dtype == np.uint16
    assert all_of(small) == [[65_535, 0]]
    assert all_of(mixed) == [[1, 2], [3, 4], [151_935, 65_536]]


def test_a_folder_is_read_file_by_file_and_names_its_domains(tmp_path: Path) -> None:
    write(tmp_path / "b-00001-of-00002.parquet", [[5, 6]])
    write(tmp_path / "b-00000-of-00002.parquet", [[3, 4]])
    write(tmp_path / "deep" / "a.parquet", [[7, 8]])
    write(tmp_path / "c.parquet", [[0, 1], [1, 2]], domain=pa.array(["law", "code"]))
    blocks = TokenDataset(tmp_path, 2)
    assert all_of(blocks) == [[3, 4], [5, 6], [0, 1], [1, 2], [7, 8]]
    assert blocks.domains.tolist() == ["b", "b", "law", "code", "a"]


def test_another_column_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [[1, 2]], other=pa.array([[3, 4]]), text=pa.array(["x"]))
    assert all_of(TokenDataset(path, 2, "other")) == [[3, 4]]
    for column, message in (
        ("ids", "no column 'ids'; the columns there are input_ids, other, text"),
        ("text", "column 'text' holds string; expected lists of whole numbers, the token ids"),
    ):
        with pytest.raises(PatterningError, match=rf"t\.parquet: {message}"):
            TokenDataset(path, 2, column)


def test_token_tables_of_this_project_are_read(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 500, (20, 8))
    path = tmp_path / "train.parquet"
    header = {"vocabulary_size": 500, "tokenizer_sha256": "x", "split": "train"}
    write_token_table(path, tokens, ["a", "b"] * 10, np.arange(20), **header)
    assert all_of(TokenDataset(path, 8)) == tokens.tolist()
    halves = TokenDataset(path, 4)
    assert all_of(halves) == tokens.reshape(40, 4).tolist()
    assert halves.domains[:4].tolist() == ["a", "a", "b", "b"]


def test_datasets_give_the_same_blocks_as_parquet(tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset.from_dict({"input_ids": ROWS, "text": ["x"] * 5})
    dataset.save_to_disk(tmp_path / "saved")
    parquet = TokenDataset(write(tmp_path / "saved.parquet", ROWS), 4)
    saved = TokenDataset(tmp_path / "saved", 4)
    assert all_of(saved) == BLOCKS
    assert saved.domains.tolist() == ["saved"] * 7
    assert saved.sha256 == parquet.sha256
    # Shuffled and filtered: the rows are then picked through an index.
    dataset.select([4, 0]).save_to_disk(tmp_path / "picked")
    assert all_of(TokenDataset(tmp_path / "picked", 4)) == BLOCKS[4:] + BLOCKS[:2]


def test_a_split_of_several_must_be_chosen(tmp_path: Path) -> None:
    import datasets

    one, two = (datasets.Dataset.from_dict({"input_ids": rows}) for rows in ([[1, 2]], [[3, 4]]))
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(tmp_path / "both")
    folder = tmp_path / "both"
    with pytest.raises(PatterningError, match=f"{folder}: there are 2 splits; give one: {folder}/train, {folder}/test"):
        TokenDataset(folder, 2)
    assert all_of(TokenDataset(folder / "test", 2)) == [[3, 4]]
    datasets.DatasetDict({"train": one}).save_to_disk(tmp_path / "single")
    assert all_of(TokenDataset(tmp_path / "single", 2)) == [[1, 2]]


def test_names_on_the_hub_take_their_split_after_a_colon(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, split: str | None) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_dict({"input_ids": [[1, 2]]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert TokenDataset("owner/name:validation", 2).domains.tolist() == ["name:validation"]
    TokenDataset("owner/name", 2)
    assert asked == [("owner/name", "validation"), ("owner/name", None)]


def test_without_datasets_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for path in (tmp_path, "owner/name"):
        with pytest.raises(PatterningError, match=r"needs the package datasets; pip install patterning-dist\[hf\]"):
            TokenDataset(path, 2)


def test_what_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for path in (tmp_path / "nowhere", "./nowhere", "data/nowhere.parquet"):
        with pytest.raises(PatterningError, match=r"nowhere.*: no such file or folder; expected Parquet, or a dataset"):
            TokenDataset(path, 2)
    with pytest.raises(
        PatterningError, match=r"owner/name: no such file or folder, and not to be had as a dataset from"
    ):
        TokenDataset("owner/name", 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PatterningError, match=r"empty: no \*\.parquet in this folder, and no dataset saved"):
        TokenDataset(tmp_path / "empty", 2)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(PatterningError, match=r"torn\.parquet: not a readable Parquet file"):
        TokenDataset(tmp_path / "torn.parquet", 2)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(PatterningError, match=r": not a readable dataset \(.*\); save it again"):
        TokenDataset(tmp_path, 2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 2], None], "row 1: input_ids is null; give token ids or text, or leave the row out"),
        ([[1, 2], [], [None, 3]], "row 2: input_ids holds a null; mend that row"),
        ([[1, 2], [4, 5], [1], [-1, 6]], "row 3: input_ids holds a negative number, which is no token"),
        ([[1, 2**31]], "row 0: input_ids holds a number above 2147483647, which is no token"),
    ],
)
def test_rows_that_are_no_tokens_are_named(tmp_path: Path, rows: list, message: str) -> None:
    with pytest.raises(PatterningError, match=rf"t\.parquet {message}"):
        TokenDataset(write(tmp_path / "t.parquet", rows), 2)


def test_rows_of_one_document_are_named_by_a_column(tmp_path: Path) -> None:
    rows = [[1, 2, 3, 4], [5, 6], [7, 8], [9, 9]]
    for documents in (["b", "a", "b", "c"], [5, 2, 5, 9]):
        blocks = TokenDataset(write(tmp_path / "t.parquet", rows, document=pa.array(documents)), 2)
        assert np.unique(blocks.documents, return_inverse=True)[1].tolist() == [1, 1, 0, 1, 2]
    assert blocks.remarks == []
    other = TokenDataset(write(tmp_path / "t.parquet", rows, document=pa.array([5, 2, 2, 9])), 2)
    assert other.sha256 != blocks.sha256
    with pytest.raises(PatterningError, match=r"t\.parquet row 2: document is null; name it or remove the column"):
        TokenDataset(write(tmp_path / "t.parquet", rows, document=pa.array(["b", "a", None, "c"])), 2)


def test_a_domain_that_is_null_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [[1, 2], [3, 4]], domain=pa.array(["a", None]))
    with pytest.raises(PatterningError, match=r"t\.parquet row 1: domain is null; name it or remove the column"):
        TokenDataset(path, 2)


def test_data_without_a_token_to_predict_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [[1], [], [7]])
    message = r"t\.parquet: 3 rows in column 'input_ids', none with a token to predict; expected rows of two tokens"
    with pytest.raises(PatterningError, match=message):
        TokenDataset(path, 14)
    with pytest.raises(PatterningError, match=r"none\.parquet: no rows in column 'input_ids', none with a token"):
        TokenDataset(write(tmp_path / "none.parquet", []), 2)
    with pytest.raises(PatterningError, match=r"t\.parquet: context length 1; expected 2 or more"):
        TokenDataset(path, 1)
    with pytest.raises(PatterningError, match=r"t\.parquet: no token table of this project; say the context length"):
        TokenDataset(path)


def test_tokens_outside_the_vocabulary_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [[0, 1]] * 3)
    write(tmp_path / "b.parquet", [[7], [0, 49], [1], [0, 49], [0, 50], [0, 51]])
    blocks = TokenDataset(tmp_path, 2)
    blocks.check_vocabulary(52)
    message = r"b\.parquet row 4: token 50 in column 'input_ids', and the model's vocabulary ends at 49; tokenise"
    with pytest.raises(PatterningError, match=message):
        blocks.check_vocabulary(50)


def test_the_hash_follows_content_and_a_copy_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", ROWS)
    blocks = TokenDataset(path, 4)
    message = pickle.dumps(blocks)
    assert len(message) < 500
    assert all_of(pickle.loads(message)) == BLOCKS
    others = [
        TokenDataset(path, 3),
        TokenDataset(write(tmp_path / "u" / "t.parquet", [[1, *ROWS[0][1:]], *ROWS[1:]]), 4),
        TokenDataset(write(tmp_path / "v.parquet", ROWS), 4),  # another domain
    ]
    assert len({blocks.sha256, *(other.sha256 for other in others)}) == 4
    assert TokenDataset(write(tmp_path / "w" / "t.parquet", ROWS, pa.large_list(pa.int16())), 4).sha256 == blocks.sha256
