"""What stage predict says before a training is what the training then does, on samples that neither has seen.

Batches are large: the flow knows nothing of minibatch noise, which takes a quarter of the response away at a batch of
32 and a rate of 0.1 here (gradient descent on all samples does what is predicted to 2 %).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import window_task
import yaml
from tiny_run import quiet

from patterning_dist.config import load_config
from patterning_dist.data.weights import SampleWeights, write_sample_weights
from patterning_dist.driver import run_stages
from patterning_dist.stages.predict import RESULT, predict
from patterning_dist.storage.run import RunDirectory

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow, pytest.mark.timeout(600)]

ARMS = ("plus", "minus", "permuted")
# By another optimizer than that of the section, whichever that is.
OWN = {"optimizer": "sgd", "learning_rate": 0.08, "num_steps": 40}
TRAININGS = {
    "sgd": {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "learning_rate": 0.002, "weight_decay": 0.1},
}


def realised_metric(run: Path, arm: str, name: str, base: str) -> float:
    """Of an arm less that of another at the end, mean over seeds."""

    def of(arm: str) -> list[float]:
        reports = sorted((run / "retrain" / arm).glob("seed-*/evaluation.json"))
        return [json.loads(report.read_text())[name] for report in reports]

    return float(np.mean(of(arm)) - np.mean(of(base)))


def experiment(folder: Path, training: dict[str, Any]) -> Path:
    """A baseline and arms that weigh the second group up, or down, from it on; the weights are given."""
    groups = np.arange(window_task.NUM_TRAIN) % 2
    for name, weight in {"up": np.where(groups, 1.8, 0.2), "down": np.where(groups, 0.2, 1.8)}.items():
        write_sample_weights(folder / f"{name}.parquet", np.arange(len(groups)), None, weight, {}, key="sample_id")
    settings = {
        "name": "window",
        "seed": 1,
        "device": "cpu",
        "data": {"kind": "function", "load": "window_task:load"},
        "model": {
            "kind": "module",
            "initialise": "window_task:initialise",
            "per_sample_loss": "window_task:per_sample_loss",
        },
        "training": {"num_steps": 300, "batch_size": 128, "evaluate_every": 100, **training},
        "sampling": {
            "components": [{"name": "everything"}],
            "observables": [
                {"kind": "split_loss", "name": "first", "split": "domain:first"},
                {"kind": "split_loss", "name": "second", "split": "domain:second"},
                {"kind": "split_loss", "name": "overall", "split": "overall"},
            ],
            "num_chains": 2,
            "num_draws": 16,
            "burn_in": 0,
            "inverse_temperature": 100,
            "localization": 100,
            "step_size": 1e-4,
            "probe_sequences": 16,
            "evaluation_sequences": 2000,
        },
        "predict": {"curvature_sequences": 512},
        "retrain": {
            "start": "baseline",
            "seeds": [0, 1, 2],
            "num_steps": 48,
            "evaluate_every": 48,
            "arms": [
                "base",
                {"name": "up", "weights": str(folder / "up.parquet")},
                {"name": "half", "weights": str(folder / "up.parquet"), "strength": 0.5},
                {"name": "down", "weights": str(folder / "down.parquet")},
                {"name": "own", "start": "baseline", "window": OWN},
                {"name": "own_up", "weights": str(folder / "up.parquet"), "start": "baseline", "window": OWN},
                {"name": "scratch", "weights": str(folder / "up.parquet"), "start": "initialisation", "seeds": [0]},
                {"name": "drawn", "weights": str(folder / "up.parquet"), "weighting": "draw", "seeds": [0]},
            ],
        },
    }
    path = folder / f"{training['optimizer']}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.extended)])
def test_what_is_predicted_is_realised(tmp_path: Path, optimizer: str) -> None:
    config, run = load_config(experiment(tmp_path, TRAININGS[optimizer])), tmp_path / "run"
    run_stages(config, None, run)
    found = json.loads((run / "predict" / "response.json").read_text())["arms"]
    assert "from scratch" in found["scratch"]["outside"] and "drawn" in found["drawn"]["outside"]
    realised = json.loads((run / "summary.json").read_text())["realised"]
    for arm in ("up", "half", "down", "own_up"):
        assert found[arm]["outside"] is None
        for name in ("first", "second"):
            entry, came = found[arm]["observables"][name], realised[arm][name]["value"]
            low, high = entry["interval"]
            assert low < came < high, (arm, name, entry, realised[arm][name])
            if name == "second":  # the other one moves by little more than its sampling error
                assert came / entry["value"] == pytest.approx(1, abs=0.2), (arm, name, entry, came)
        # The task's own metrics are predicted too, of the very samples that trainings report them of.
        metric = found[arm]["metrics"]["second_loss"]
        came = realised_metric(run, arm, "second_loss", "own" if arm == "own_up" else "base")
        assert metric["interval"][0] < came < metric["interval"][1], (arm, metric, came)
    assert (
        found["up"]["observables"]["second"]["value"] < -0.005 < 0.005 < found["down"]["observables"]["second"]["value"]
    )
    # Nothing is walked again where nothing has changed.
    before = {file: file.stat().st_mtime_ns for file in (run / "predict").rglob("*.npz")}
    assert len(before) == 6
    run_stages(load_config(experiment(tmp_path, TRAININGS[optimizer])), None, run)
    assert {file: file.stat().st_mtime_ns for file in (run / "predict").rglob("*.npz")} == before


def test_solved_weights_are_held_to_a_cost(tmp_path: Path) -> None:
    largest = 0.001
    sections = {
        "response": {"direction": {"component": "everything", "conjugate_gradient_iterations": 5}},
        "solve": {"component": "everything", "targets": {"second": -0.05}, "effective_sample_share": 0.8},
        "predict": {"curvature_sequences": 128, "segments": 2},
    }
    path, tables = experiment(tmp_path, TRAININGS["sgd"]), {}
    settings = yaml.safe_load(path.read_text()) | sections
    settings["retrain"]["arms"] = ["base", "plus", "minus"]
    for name, cost in (("free", {}), ("held", {"max_cost": largest})):
        path.write_text(yaml.safe_dump(settings | {"solve": sections["solve"] | cost}))
        run_stages(load_config(path), ["train", "sample", "solve"], tmp_path / "run")
        tables[name] = {arm: SampleWeights.load(tmp_path / f"run/weights/{arm}.parquet", "sample_id") for arm in ARMS}
    solution = json.loads((tmp_path / "run/weights/solution.json").read_text())["arms"]
    for arm in ("plus", "minus"):
        cost = solution[arm]["cost"]
        value, (_, most) = cost["overall"]["value"], cost["overall"]["interval"]
        assert value < most <= largest == cost["max_cost"]
        free, held = (tables[name][arm].weight for name in ("free", "held"))
        np.testing.assert_allclose(held - 1, cost["scale"] * (free - 1), atol=1e-6)
        share = held.sum() ** 2 / (held @ held) / len(held)
        assert solution[arm]["effective_sample_share"] == pytest.approx(share, rel=1e-6)
        # The next larger one that was tried costs too much; and what was found is near it.
        if cost["scale"] < 1:
            above = min((s, c) for s, c in cost["tried"] if s > cost["scale"])
            assert above[1] is None or above[1] > largest
            assert most > 0.5 * largest
    assert min(solution[arm]["cost"]["scale"] for arm in ("plus", "minus")) < 1
    np.testing.assert_allclose(np.sort(tables["held"]["permuted"].weight), np.sort(tables["held"]["plus"].weight))


def test_two_ranks_walk_where_one_does(tmp_path: Path) -> None:
    """A model in two shards, in AdamW's metric: observables and the task's metrics agree to the rounding of sums."""
    path, found = experiment(tmp_path, TRAININGS["adamw"]), {}
    settings = yaml.safe_load(path.read_text())
    settings["training"] |= {"num_steps": 40, "batch_size": 16}
    settings["predict"] = {"gradient_sequences": 512, "curvature_sequences": 64, "segments": 2}
    arms = [arm for arm in settings["retrain"]["arms"] if arm == "base" or arm["name"] == "up"]
    settings["retrain"] |= {"num_steps": 8, "evaluate_every": 8, "arms": arms}
    path.write_text(yaml.safe_dump(settings))
    run_stages(load_config(path), ["train"], tmp_path / "run")
    for ranks in (1, 2):
        config = load_config(path, [f"sampling.ranks_per_chain={ranks}"])
        with RunDirectory(tmp_path / "run").locked() as run:
            predict(config, run, quiet())
        found[ranks] = json.loads((tmp_path / "run" / RESULT).read_text())["arms"]["up"]
    one, two = found[1], found[2]
    assert one["outside"] is two["outside"] is None and one["growth"] == pytest.approx(two["growth"], rel=1e-3)
    assert set(one["metrics"]) == set(two["metrics"]) >= {"first_loss", "second_loss"}
    for kind, keys in (("observables", ("value", "in_half_the_segments", "standard_error")), ("metrics", ("value",))):
        for name, entry in one[kind].items():
            for key in keys:  # losses of about 1 nat, in float32, after three segments
                assert two[kind][name][key] == pytest.approx(entry[key], abs=1e-5), (kind, name, key)
    assert abs(one["metrics"]["second_loss"]["value"]) > 1e-3
