"""The reward model of the examples, small: every arm is trained, predicted and measured, and its weights travel."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from patterning_dist.cli import app

pytestmark = [pytest.mark.extended, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SETS = ("easy", "normal", "hard")


def run(name: str, directory: Path, data: Path, **changes: str) -> dict[str, Any]:
    """summary.json of a run on these pairs."""
    changes |= {"data.train": str(data / "train.parquet"), "model.path": changes.get("model.path", str(data / "model"))}
    changes |= {f"data.held_out.{split}": str(data / f"{split}.parquet") for split in SETS}
    options = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    command = ["run", str(ROOT / "configs" / f"{name}.yaml"), "--run-dir", str(directory), *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return json.loads((directory / "summary.json").read_text())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, names = tmp_path_factory.mktemp("pairs"), runpy.run_path(str(ROOT / "examples" / "reward_model.py"))
    names["main"](folder, names["SMALL"])
    return folder


def test_the_pairs_are_biased_in_training_and_matched_where_they_are_held_out(pairs: Path) -> None:
    lengths = {}
    for name in ("train", *SETS):
        table = pq.read_table(pairs / f"{name}.parquet")
        lengths[name] = [np.array([len(ids) for ids in table[side].to_pylist()]) for side in ("chosen", "rejected")]
    chosen, rejected = lengths["train"]
    planted = np.array(pq.read_table(pairs / "train.parquet")["domain"].to_pylist()) == "planted"
    assert (chosen[planted] > rejected[planted]).all()
    assert 0.75 < (chosen > rejected).mean() < 0.95 and 0.25 < (chosen > rejected)[~planted].mean() < 0.75
    score = pq.read_table(pairs / "lengths.parquet")
    np.testing.assert_array_equal(score["score"].to_numpy(), rejected - chosen)
    (easy_chosen, easy_rejected), (hard_chosen, hard_rejected) = lengths["easy"], lengths["hard"]
    assert (easy_chosen > easy_rejected).all() and (lengths["normal"][0] == lengths["normal"][1]).all()
    np.testing.assert_array_equal(hard_chosen, easy_rejected)
    np.testing.assert_array_equal(hard_rejected, easy_chosen)
    tables = [pq.read_table(pairs / f"{name}.parquet", columns=["prompt", "document"]) for name in SETS]
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])


def test_every_arm_is_predicted_and_measured_and_weights_travel(pairs: Path, tmp_path: Path, local_ray: None) -> None:
    summary = run(
        "reward-model-small", tmp_path / "run", pairs, **{"solve.controls.0.path": str(pairs / "lengths.parquet")}
    )
    arms = ("plus", "permuted", "length_only", "oracle", "minimum_norm")
    assert set(summary["arms"]) == {"base", *arms}
    windows = json.loads((tmp_path / "run" / "predict" / "response.json").read_text())["arms"]
    solution = json.loads((tmp_path / "run" / "weights" / "solution.json").read_text())["arms"]
    for arm in arms:
        assert windows[arm]["outside"] is None and set(windows[arm]["observables"]) >= {*SETS, "overall"}
        for metric in ("hard", "accuracy_hard"):
            assert summary["contrasts"][arm]["base"][metric]["covers"] == ["seeds", "sequences"]
        assert solution[arm]["effective_sample_share"] == pytest.approx(0.6, abs=2e-3)
    swapped = pq.read_table(tmp_path / "run" / "weights" / "minimum_norm.parquet")["swapped"].to_numpy()
    assert 0 < swapped.sum() == solution["minimum_norm"]["num_swapped"]
    train = pq.read_table(pairs / "train.parquet")["domain"].to_numpy(zero_copy_only=False)
    oracle = pq.read_table(tmp_path / "run" / "weights" / "oracle.parquet")["weight"].to_numpy()
    assert oracle[train == "natural"].min() > 1 > oracle[train == "planted"].max()
    # To another model: tables are arms, and nothing is solved for.
    table = tmp_path / "run" / "weights" / "plus.parquet"
    swaps, own = table.with_name("minimum_norm.parquet"), '{{name: {}, weights: "{}"}}'
    changes = dict.fromkeys(("solve", "check", "predict", "response.direction"), "null")
    changes |= {"retrain.arms": f"[base, {own.format('plus', table)}, {own.format('minimum_norm', swaps)}]"}
    changes |= {"model.path": str(pairs / "wider")}
    moved = run("reward-model-small", tmp_path / "moved", pairs, **changes)
    assert set(moved["contrasts"]) == {"plus", "minimum_norm"}
    assert (
        moved["contrasts"]["minimum_norm"]["base"]["hard"]["value"]
        != moved["contrasts"]["plus"]["base"]["hard"]["value"]
    )
