"""Stage report takes arms as data, compares them by seed, and reads what trainings wrote without opening a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import tiny_config

from patterning_dist.config import ArmConfig
from patterning_dist.report.predictions import predictions
from patterning_dist.stages.arms import compare, contrasts, read_arms


def write_arm(folder: Path, seeds: dict[int, float], scores: list[float] | None = None) -> None:
    for seed, loss in seeds.items():
        here = folder / f"seed-{seed}"
        here.mkdir(parents=True)
        columns: dict[str, Any] = {"step": [0, 5], "train_loss": [9.0, 8.0], "accuracy": [0.0, loss]}
        if scores is not None:
            columns |= {"prefix_matching": scores, "prefix_matching_0_1": scores}
        pq.write_table(pa.table({**columns, "seconds": [0.0, 1.0]}), here / "metrics.parquet")
        last = {name: values[-1] for name, values in columns.items() if name not in ("step", "train_loss")}
        report = last | {"observables": {"induction": 10 * loss}, "seconds": 1.0, "fingerprint": "x"}
        (here / "evaluation.json").write_text(json.dumps(report))


@pytest.fixture
def arms(tiny_run: Path, tmp_path: Path) -> list[Any]:
    config = tiny_config(tiny_run, "retrain.seeds=[0,1]")
    own = [
        ArmConfig(name="plain"),
        ArmConfig(name="half-way", weights="plus", strength=0.5),
        ArmConfig(name="permuted", weights="permuted", seeds=[1, 2]),
        ArmConfig(name="other", weights=Path("mine.parquet"), seeds=[7]),
    ]
    config = config.model_copy(update={"retrain": config.retrain.model_copy(update={"arms": own})})
    write_arm(tmp_path / "retrain/plain", {0: 1.0, 1: 2.0}, [0.0, 0.05])
    write_arm(tmp_path / "retrain/half-way", {0: 1.5, 1: 3.0}, [0.0, 0.2])
    write_arm(tmp_path / "retrain/permuted", {1: 2.5, 2: 9.0}, [0.2, 0.0])
    write_arm(tmp_path / "retrain/other", {7: 0.0})
    return read_arms(config, tmp_path)


def test_arms_are_compared_seed_by_seed_with_the_plain_one_and_the_control(arms: list[Any]) -> None:
    found, unpaired = contrasts(arms)
    assert {arm: list(against) for arm, against in found.items()} == {
        "half-way": ["plain", "permuted"],
        "permuted": ["plain"],
    }
    entry = found["half-way"]["plain"]["accuracy"]
    assert entry["per_seed"].tolist() == [0.5, 1.0] and entry["value"] == 0.75
    # Student t with one degree of freedom: 12.706 times the standard error of 0.5 and 1.
    assert entry["interval"] == pytest.approx([0.75 - 12.7062 * 0.25, 0.75 + 12.7062 * 0.25], rel=1e-5)
    shared = found["half-way"]["permuted"]["induction"]
    assert shared["per_seed"].tolist() == [5.0] and shared["interval"] is None
    assert unpaired == [
        f"other and {name} have no seed in common and are not compared; give them the same seeds"
        for name in ("plain", "permuted")
    ]


def test_what_a_training_measured_is_a_metric_and_a_head_is_not(arms: list[Any]) -> None:
    plain, half, permuted, other = arms
    assert list(plain.metrics) == ["accuracy", "prefix_matching"] and list(other.metrics) == ["accuracy"]
    assert (half.transitions, permuted.transitions, plain.transitions) == ([5, 5], [0, 0], [None, None])
    assert other.transitions is None
    assert compare(half, other, "metrics") == {}
    assert [arm.is_weighted for arm in arms] == [False, True, False, True]


def test_an_arm_at_another_strength_has_its_own_prediction_and_check() -> None:
    estimate = {"value": -0.2, "standard_error": 0.02, "interval": [-0.24, -0.16]}
    solved = {"predicted_response": {"induction": estimate}, "cross_fitted_response": {"induction": estimate}}
    solution = {"arms": {"plus": solved, "permuted": {"effective_sample_share": 0.5}}}
    measured = {"induction": {"value": -0.09, "predicted": -0.1}, "loss": {"value": 1.0}}
    checked = {"weights": "plus", "strengths": {"+0.5": measured}}
    arms = {"half": {"weights": "plus", "strength": 0.5}, "own": {"weights": "mine.parquet", "strength": 1.0}}
    found = predictions(solution, checked, {}, arms)
    assert found["predicted"]["plus"]["induction"]["value"] == -0.2
    half = found["predicted"]["half"]["induction"]
    assert (half["value"], half["standard_error"], *half["interval"]) == pytest.approx((-0.1, 0.01, -0.12, -0.08))
    assert found["checked"] == {"half": {"induction": measured["induction"]}}
    assert set(found["cross_fitted"]) == {"plus", "half"}
    assert predictions({}, {}, {}, arms) == {"predicted": {}, "cross_fitted": {}, "checked": {}, "window": {}}


def test_importing_the_stage_imports_no_torch() -> None:
    code = "import sys, patterning_dist.stages.report; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
