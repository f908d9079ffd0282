"""Weights land on the token they name, missing ones are counted, and bad rows are refused by number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from patterning_dist.data.weights import SampleWeights, refuse_swaps, swaps_labels, write_sample_weights
from patterning_dist.errors import PatterningError


def test_token_weights_join_by_key_whatever_their_order(tmp_path: Path) -> None:
    rho = np.random.default_rng(0).random((6, 9)).astype(np.float32)
    sequence_id, column = np.divmod(np.random.default_rng(1).permutation(rho.size)[:40], 9)
    path = tmp_path / "plus.parquet"
    write_sample_weights(path, sequence_id, column + 1, rho[sequence_id, column], {"arm": "plus", "strength": 0.5})
    loaded = SampleWeights.load(path)
    joined = loaded.join(num_samples=6, num_positions=9)
    expected = np.ones_like(rho)
    expected[sequence_id, column] = rho[sequence_id, column]
    np.testing.assert_array_equal(joined.weights, expected)
    assert joined.weights.dtype == np.float32
    assert (joined.num_joined, joined.num_missing) == (40, 14)
    assert loaded.metadata == {"arm": "plus", "strength": 0.5}
    schema = pq.read_schema(path)
    assert {field.name: str(field.type) for field in schema} == {
        "sequence_id": "int64",
        "position": "int16",
        "weight": "float",
    }


def test_sequence_weights_hold_for_all_their_tokens(tmp_path: Path) -> None:
    write_sample_weights(tmp_path / "w.parquet", np.array([2, 0]), None, np.array([0.0, 3.0]), {})
    joined = SampleWeights.load(tmp_path / "w.parquet").join(3, 4)
    np.testing.assert_array_equal(joined.weights, np.array([[3.0], [1.0], [0.0]]) * np.ones((3, 4)))
    assert (joined.num_joined, joined.num_missing) == (8, 4)


def test_a_users_own_table_needs_no_header(tmp_path: Path) -> None:
    table = pa.table({"sequence_id": pa.array([1], pa.int32()), "position": [2], "weight": [2], "note": ["mine"]})
    pq.write_table(table, tmp_path / "w.parquet")
    loaded = SampleWeights.load(tmp_path / "w.parquet")
    assert loaded.join(2, 3).weights.tolist() == [[1, 1, 1], [1, 2, 1]]
    assert loaded.metadata == {}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"sequence_id": [0, 1], "position": [1, 1], "weight": [1.0, -0.5]},
            r"row 1: weight is -0\.5; expected a finite",
        ),
        (
            {"sequence_id": [0, 1], "position": [1, 1], "weight": [float("nan"), 1.0]},
            r"row 0: weight is nan; expected",
        ),
        ({"sequence_id": [0, 1], "weight": [float("inf"), 1.0]}, r"row 0: weight is inf; expected"),
        ({"sequence_id": [0, 1], "weight": [1.0, None]}, r"row 1: weight is null; give a value"),
        ({"sequence_id": [0, -1], "weight": [1.0, 1.0]}, r"row 1: sequence_id is -1; expected 0 or more"),
        (
            {"sequence_id": [0, 1], "position": [0, 1], "weight": [1.0, 1.0]},
            r"row 0: position is 0; expected 1 to",
        ),
        (
            {"sequence_id": [3, 1, 3], "position": [2, 2, 2], "weight": [1.0, 1.0, 1.0]},
            r"row 2: sequence_id 3, position 2 was given before; expected one row for each",
        ),
        ({"sequence_id": [3, 3], "weight": [1.0, 1.0]}, r"row 1: sequence_id 3 was given before"),
        (
            {"sequence": [0], "weight": [1.0]},
            r"no column 'sequence_id'; the columns there are sequence, weight",
        ),
        (
            {"sequence_id": [0.0], "weight": [1.0]},
            r"column 'sequence_id' holds double; expected whole numbers",
        ),
        ({"sequence_id": [0], "weight": ["1"]}, r"column 'weight' holds string; expected numbers"),
    ],
)
def test_bad_rows_are_refused_by_file_and_row(tmp_path: Path, columns: dict, message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "w.parquet")
    with pytest.raises(PatterningError, match=r"w\.parquet.*" + message):
        SampleWeights.load(tmp_path / "w.parquet")


def test_rows_about_another_dataset_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.parquet"
    write_sample_weights(path, np.array([0, 7]), np.array([1, 9]), np.ones(2), {})
    weights = SampleWeights.load(path)
    with pytest.raises(PatterningError, match=r"row 1: sequence_id is 7; the dataset has samples 0 to 6"):
        weights.join(7, 9)
    with pytest.raises(PatterningError, match=r"row 1: position is 9; the dataset predicts positions 1 to 8"):
        weights.join(8, 8)
    assert weights.join(8, 9).num_joined == 2
    with pytest.raises(PatterningError, match=r"has a column 'position', and a sample has one loss here"):
        weights.join(8, None)


def test_bad_weights_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(PatterningError, match=r"w\.parquet row 0: weight is nan"):
        write_sample_weights(tmp_path / "w.parquet", np.array([0]), None, np.array([np.nan]), {})
    assert list(tmp_path.iterdir()) == []


def test_weights_of_samples_with_one_loss_each(tmp_path: Path) -> None:
    path = tmp_path / "w.parquet"
    write_sample_weights(path, np.array([2, 0]), None, np.array([0.5, 3.0]), {}, key="sample_id")
    joined = SampleWeights.load(path, "sample_id").join(4, None)
    assert joined.weights.tolist() == [3.0, 1.0, 0.5, 1.0]
    assert (joined.num_joined, joined.num_missing) == (2, 2)
    with pytest.raises(PatterningError, match="no column 'sequence_id'; the columns there are sample_id, weight"):
        SampleWeights.load(path)


def test_losses_that_do_not_count_weigh_nothing_and_are_not_missed(tmp_path: Path) -> None:
    path = tmp_path / "w.parquet"
    write_sample_weights(path, np.array([0, 0, 1]), np.array([1, 2, 1]), np.array([2.0, 3.0, 4.0]), {})
    counted = np.array([[True, False, True], [True, True, False]])
    joined = SampleWeights.load(path).join(2, 3, counted)
    assert joined.weights.tolist() == [[2.0, 0.0, 1.0], [4.0, 1.0, 0.0]]
    assert (joined.num_joined, joined.num_missing) == (2, 2)


def test_the_strength_stretches_weights_about_one(tmp_path: Path) -> None:
    path = tmp_path / "w.parquet"
    write_sample_weights(path, np.arange(3), None, np.array([0.5, 1.0, 1.25]), {})
    table = SampleWeights.load(path)
    assert table.scaled(2.0).weight.tolist() == [0.0, 1.0, 1.5]
    assert table.scaled(0.5).weight.tolist() == [0.75, 1.0, 1.125]
    assert table.scaled(1.0) is table
    with pytest.raises(PatterningError, match=r"w\.parquet row 0: 1 \+ strength .* is -0\.5; .*lower the strength"):
        table.scaled(3.0)


def test_swapped_labels_are_weights_below_zero_at_every_strength(tmp_path: Path) -> None:
    path = tmp_path / "w.parquet"
    write_sample_weights(
        path, np.arange(3), None, np.array([0.5, 1.0, 2.5]), {}, swapped=np.array([True, False, False])
    )
    assert swaps_labels(path)
    with pytest.raises(PatterningError, match=r"w\.parquet: swaps labels .* and here weights alone are taken"):
        refuse_swaps(path)
    table = SampleWeights.load(path)
    joined = table.join(4, None)
    assert joined.weights.tolist() == [0.5, 1.0, 2.5, 1.0]
    assert joined.swapped is not None and joined.swapped.tolist() == [True, False, False, False]
    # 1 + s (w - 1) of w = -0.5, 1, 2.5
    double, half = table.scaled(2.0).join(3, None), table.scaled(0.5).join(3, None)
    assert double.weights.tolist() == [2.0, 1.0, 4.0] and double.swapped is not None and double.swapped[0]
    assert half.weights.tolist() == [0.25, 1.0, 1.75] and half.swapped is None
    write_sample_weights(path, np.arange(3), None, np.ones(3), {})
    refuse_swaps(path)
    assert not swaps_labels(path) and SampleWeights.load(path).join(3, None).swapped is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"swapped": [1, 0]}, "column 'swapped' holds int64; expected true or false"),
        ({"swapped": [True, None]}, "column 'swapped' holds nulls; expected true or false"),
        ({"swapped": [True, False], "position": [1, 2]}, "labels are swapped of whole samples; remove the column"),
    ],
)
def test_what_says_nothing_of_labels_is_refused(tmp_path: Path, columns: dict, message: str) -> None:
    pq.write_table(pa.table({"sequence_id": [0, 1], "weight": [1.0, 1.0]} | columns), tmp_path / "w.parquet")
    with pytest.raises(PatterningError, match=r"w\.parquet: " + message):
        SampleWeights.load(tmp_path / "w.parquet")
    with pytest.raises(PatterningError, match="labels are swapped of whole samples; expected no positions"):
        write_sample_weights(tmp_path / "v.parquet", np.ones(1), np.ones(1), np.ones(1), {}, swapped=np.ones(1, bool))
