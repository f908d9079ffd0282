"""Score folders and banks as bergson 2.5 writes and reads them: the layout is that of its sources, field by field."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from patterning_dist.data.bergson import (
    read_scores,
    read_subsets,
    sample_sums,
    write_scores,
    write_subsets,
    write_validation,
)
from patterning_dist.errors import PatterningError

SCORES = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert [file.name for file in write_scores(tmp_path, SCORES)] == ["info.json", "scores.bin"]
    found, offsets = read_scores(tmp_path)
    np.testing.assert_array_equal(found, SCORES)
    assert offsets is None


def test_the_layout_is_that_of_bergson(tmp_path: Path) -> None:
    """``_score_struct_dtype`` of bergson/score/score_writer.py 2.5.1 for float32 and two queries."""
    write_scores(tmp_path, SCORES[:2])
    info = json.loads((tmp_path / "info.json").read_text())
    assert info == {
        "attribute_tokens": False,
        "num_items": 5,
        "num_rows": 5,
        "num_scores": 2,
        "dtype": {
            "names": ["score_0", "written_0", "score_1", "written_1"],
            "formats": ["float32", "bool", "float32", "bool"],
            "offsets": [0, 4, 8, 12],
            "itemsize": 16,
        },
    }
    # As ``bergson.data.load_scores`` opens it.
    rows = np.memmap(tmp_path / "scores.bin", dtype=np.dtype(info["dtype"]), mode="r", shape=(info["num_rows"],))
    np.testing.assert_array_equal(rows["score_1"], SCORES[1])
    assert rows["written_0"].all() and rows["written_1"].all()


def test_scores_of_other_widths_are_read(tmp_path: Path) -> None:
    layout = {"names": ["score_0", "written_0"], "formats": ["float16", "bool"], "offsets": [0, 2], "itemsize": 8}
    rows = np.zeros(4, np.dtype(layout))
    rows["score_0"], rows["written_0"] = [1, 2, 3, 4], True
    rows.tofile(tmp_path / "scores.bin")
    info = {"attribute_tokens": False, "num_items": 4, "num_rows": 4, "num_scores": 1, "dtype": layout}
    (tmp_path / "info.json").write_text(json.dumps(info))
    assert read_scores(tmp_path)[0].tolist() == [[1, 2, 3, 4]]


def test_scores_of_tokens_add_up_to_those_of_samples(tmp_path: Path) -> None:
    write_scores(tmp_path, SCORES, np.array([0, 2, 2, 5]))
    found, offsets = read_scores(tmp_path)
    assert offsets is not None and offsets.tolist() == [0, 2, 2, 5]
    sums = sample_sums(found, offsets)
    np.testing.assert_allclose(sums[:, 0], SCORES[:, :2].sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(sums[:, 1], 0)
    np.testing.assert_allclose(sums[:, 2], SCORES[:, 2:].sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize(("settings", "sign"), [({"higher_is_better": False}, 1), ({}, -1), (None, 1)])
def test_scores_signed_as_influence_are_turned(tmp_path: Path, settings: dict | None, sign: int) -> None:
    """As ``load_scores_loss_signed``: by the ``score_cfg`` beside them, whose default is that higher is better."""
    write_scores(tmp_path, SCORES)
    command = {"run_path": "x"} | ({} if settings is None else {"score_cfg": settings})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"steps": [{"score": command}]}))
    np.testing.assert_array_equal(read_scores(tmp_path)[0], sign * SCORES)


def test_folders_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PatterningError, match=r"no folder of scores.*info.json"):
        read_scores(tmp_path)
    write_scores(tmp_path, SCORES)
    content = bytearray((tmp_path / "scores.bin").read_bytes())
    (tmp_path / "scores.bin").write_bytes(content[:-24])
    with pytest.raises(PatterningError, match="not all scores are there"):
        read_scores(tmp_path)
    content[4] = 0  # the flag of the first score
    (tmp_path / "scores.bin").write_bytes(content)
    with pytest.raises(PatterningError, match="not all scores are there"):
        read_scores(tmp_path)
    content[4] = 1
    (tmp_path / "scores.bin").write_bytes(content)
    np.save(tmp_path / "candidates.npy", np.arange(3))
    with pytest.raises(PatterningError, match="of some candidates only"):
        read_scores(tmp_path)


def test_subsets_of_a_bank(tmp_path: Path) -> None:
    removed = [np.array([0, 3]), np.array([1, 2])]
    assert json.loads(write_subsets(tmp_path, removed).read_text()) == [[0, 3], [1, 2]]
    assert [ids.tolist() for ids in read_subsets(tmp_path, 4)] == [[0, 3], [1, 2]]
    with pytest.raises(PatterningError, match=r"subset 0 leaves out sample 3, and there are 3 training samples"):
        read_subsets(tmp_path, 3)
    write_subsets(tmp_path, removed[:1])
    with pytest.raises(PatterningError, match="two or more"):
        read_subsets(tmp_path, 4)
    with pytest.raises(PatterningError, match=r"subsets.json: cannot be read"):
        read_subsets(tmp_path / "none", 4)


def test_validation_csv_has_the_columns_that_bergson_reads(tmp_path: Path) -> None:
    measured, predicted = np.array([[0.1, 0.2]]), np.array([[1.0, -2.0]])
    with open(write_validation(tmp_path / "validation.csv", measured, predicted)) as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {"subset": "0", "query": "1", "diff": "0.2", "score_sum": "-2.0"}
