"""The splits of the parentheses task: what is in them, by which id, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from patterning_dist.errors import PatterningError
from patterning_dist.experiments.two_rules import dyck
from patterning_dist.experiments.two_rules.config import TaskConfig
from patterning_dist.experiments.two_rules.strings import END, OPEN, SPLITS, BracketStrings, read_split, write_splits
from patterning_dist.storage.files import write_parquet

TASK = TaskConfig(
    min_length=8,
    length_trials=3,
    num_balanced=60,
    num_unequal=180,
    unequal="stratified",
    num_test=40,
    num_out_of_distribution=50,
)


def signs(text: str) -> np.ndarray:
    return np.array([[1 if bracket == "(" else -1 for bracket in text]], np.int8)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BracketStrings]:
    folder = tmp_path_factory.mktemp("task")
    write_splits(folder, TASK, seed=3)
    return {name: read_split(folder, name, TASK.max_length) for name in SPLITS}


def test_the_training_strings_do_not_tell_the_rules_apart(splits: dict[str, BracketStrings]) -> None:
    for name, balanced, others in (("train", 60, 180), ("test", 20, 20), ("out_of_distribution", 0, 50)):
        labels = splits[name].labels
        assert (labels.sum(), len(labels)) == (balanced, balanced + others)
        for text, label in zip(splits[name].text, labels, strict=True):
            brackets = signs(text)
            assert dyck.is_balanced(brackets)[0] == (label == 1)
            has_equal_counts = brackets.sum() == 0
            assert has_equal_counts == (label == 1 or name == "out_of_distribution")


def test_no_string_is_there_twice_and_lengths_vary(splits: dict[str, BracketStrings]) -> None:
    texts = [text for name in SPLITS for text in splits[name].text]
    assert len(set(texts)) == len(texts)
    assert set(map(len, texts)) == {8, 10, 12, 14}


def test_strings_are_padded_behind_end(splits: dict[str, BracketStrings]) -> None:
    tokens, lengths, labels = splits["train"][torch.tensor([5, 0])]
    assert tokens.shape == (2, TASK.max_length + 1)
    for row, length in zip(tokens, lengths, strict=True):
        assert (row[length:] == END).all()
        assert (row[:length] != END).all()
    assert tokens[0, 0] == OPEN, "a balanced string"
    assert labels.tolist() == [1, 1]


def test_both_labels_weigh_the_same(splits: dict[str, BracketStrings]) -> None:
    strings = splits["train"]
    weights = strings.class_weights
    assert weights.mean() == pytest.approx(1)
    assert weights[strings.labels > 0].sum() == pytest.approx(weights[strings.labels == 0].sum())


def test_the_seed_decides(tmp_path: Path) -> None:
    texts = []
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_splits(tmp_path / folder, TASK, seed)
        texts.append(read_split(tmp_path / folder, "train", TASK.max_length).text)
    assert texts[0] == texts[1] != texts[2]


def test_more_strings_than_there_are_is_an_error(tmp_path: Path) -> None:
    task = TASK.model_copy(update={"length_trials": 0, "num_balanced": 15})  # there are 14 of length 8
    with pytest.raises(PatterningError, match=r"15 different balanced strings are wanted, and no more than 14"):
        write_splits(tmp_path, task, 0)


@pytest.mark.parametrize("text", ["((x)", "()" * 8])
def test_a_table_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    write_parquet(tmp_path / "train.parquet", pa.table({"sample_id": [0], "text": [text], "label": [1]}))
    with pytest.raises(PatterningError, match=r"train.parquet: sample 0 is .*; expected at most 14 brackets"):
        read_split(tmp_path, "train", 14)
