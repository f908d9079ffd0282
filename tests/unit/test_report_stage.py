"""Stage report takes arms as data, compares them by seed, and reads what trainings wrote without opening a model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import tiny_config

from patterning_dist.config import ArmConfig
from patterning_dist.report.predictions import predictions
from patterning_dist.stages.arms import compare, contrasts, read_arms
from patterning_dist.stages.headline import headline
from patterning_dist.stages.report import _diagnostics
from patterning_dist.training.job import HELD_OUT_TABLE


def write_arm(folder: Path, seeds: dict[int, float], scores: list[float] | None = None) -> None:
    for seed, loss in seeds.items():
        here = folder / f"seed-{seed}"
        here.mkdir(parents=True)
        columns: dict[str, Any] = {"step": [0, 5], "train_loss": [9.0, 8.0], "accuracy": [0.0, loss]}
        if scores is not None:
            columns |= {"prefix_matching": scores, "prefix_matching_0_1": scores, "share": [0.0, 10 * loss]}
        pq.write_table(pa.table({**columns, "seconds": [0.0, 1.0]}), here / "metrics.parquet")
        last = {name: values[-1] for name, values in columns.items() if name not in ("step", "train_loss")}
        report = last | {"observables": {"induction": 10 * loss}, "seconds": 1.0, "fingerprint": "x"}
        # Four documents of two samples each, the last sample of no induction token.
        influence = loss * np.array([1.0, 0.5, -0.5, -0.25, 0.25, -1.0, 0.0, np.nan])
        of_metrics = {"share": influence} if scores is not None else {}
        table = {"group": np.arange(8) // 2, "induction": influence, **of_metrics}
        pq.write_table(pa.table(table), here / HELD_OUT_TABLE)
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
    assert entry["covers"] == ["seeds"]
    shared = found["half-way"]["permuted"]["induction"]
    assert shared["per_seed"].tolist() == [5.0] and shared["interval"] is None and shared["covers"] == []
    assert shared["errors"]["seeds"] is None and shared["errors"]["sequences"] > 0
    assert unpaired == [
        f"other and {name} have no seed in common and are not compared; give them the same seeds"
        for name in ("plain", "permuted")
    ]


def test_an_observable_has_an_interval_over_seeds_and_held_out_samples(arms: list[Any]) -> None:
    found = contrasts(arms)[0]["half-way"]["plain"]["induction"]
    # Differences of 5 and 10; influences of .5 and 1 times those above.
    group = 0.75 * np.array([1.5, -0.75, -0.75, 0.0])
    in_groups = 4 / 3 * np.square(group).sum()
    both = 4 / 3 * 2 * np.square(group / 3).sum() / 2
    width = (12.7062**2 * 2.5**2 + 3.18245**2 * (in_groups - both)) ** 0.5
    assert found["covers"] == ["seeds", "sequences"] and found["value"] == 7.5
    assert found["errors"] == pytest.approx({"seeds": 2.5, "sequences": in_groups**0.5})
    assert found["standard_error"] ** 2 == pytest.approx(2.5**2 + in_groups - both)
    assert found["interval"] == pytest.approx([7.5 - width, 7.5 + width], rel=1e-5)


def test_a_metric_that_is_a_mean_over_held_out_samples_has_that_interval_as_well(arms: list[Any]) -> None:
    found = contrasts(arms)[0]["half-way"]["plain"]
    assert found["share"] == {**found["induction"], "per_seed": pytest.approx([5.0, 10.0])}
    assert found["prefix_matching"]["covers"] == ["seeds"]


def test_what_a_training_measured_is_a_metric_and_a_head_is_not(arms: list[Any]) -> None:
    plain, half, permuted, other = arms
    assert list(plain.metrics) == ["accuracy", "prefix_matching", "share"] and list(other.metrics) == ["accuracy"]
    assert (half.transitions, permuted.transitions, plain.transitions) == ([5, 5], [0, 0], [None, None])
    assert other.transitions is None
    assert compare(half, other, "metrics") == {}


def test_an_arm_is_not_held_against_one_that_starts_elsewhere(arms: list[Any]) -> None:
    plain, half, *others = arms
    later = replace(half, settings=half.settings.model_copy(update={"start": "baseline"}))
    found, unpaired = contrasts([plain, later, *others])
    assert set(found) == {"permuted"}
    assert "half-way: no plain arm starts from baseline as well, and so it is not compared; add one" in unpaired


def test_an_arm_at_another_strength_has_its_own_prediction_and_check() -> None:
    estimate = {"value": -0.2, "standard_error": 0.02, "interval": [-0.24, -0.16]}
    solved = {"predicted_response": {"induction": estimate}, "cross_fitted_response": {"induction": estimate}}
    solution = {"arms": {"plus": solved, "permuted": {"effective_sample_share": 0.5}}}
    measured = {
        "induction": {"value": -0.09, "predicted": -0.1},
        "induction:rest": {"value": 1.0},
        "loss": {"value": 2.0},
    }
    checked = {"weights": "plus", "strengths": {"+0.5": measured}}
    windows = {"arms": {"half": {"observables": {"induction": estimate}}, "own": {"outside": "too far"}}}
    arms = {"half": {"weights": "plus", "strength": 0.5}, "own": {"weights": "mine.parquet", "strength": 1.0}}
    found = predictions(solution, checked, windows, arms)
    assert found["solved"]["plus"]["induction"]["value"] == -0.2
    half = found["solved"]["half"]["induction"]
    assert (half["value"], half["standard_error"], *half["interval"]) == pytest.approx((-0.1, 0.01, -0.12, -0.08))
    assert {name: entry["value"] for name, entry in found["checked"]["half"].items()} == {
        "induction": -0.09,
        "induction:rest": 1,
    }
    assert found["predicted"] == {
        "half": {"induction": estimate | {"covers": ["sequences", "seeds", "halving", "model"]}}
    }
    assert half["covers"] == found["checked"]["half"]["induction"]["covers"] == ["chains"]
    assert set(found["cross_fitted"]) == {"plus", "half"}
    assert predictions({}, {}, {}, arms) == {kind: {} for kind in found}


def test_the_headline_has_one_row_an_arm_and_target(tiny_run: Path) -> None:
    """What is there is shown, with its terms and its cost; of what is not, the reason."""
    split = {"kind": "split_loss", "name": "gap", "split": "induction_minus_rest"}
    config = tiny_config(tiny_run, f"sampling.observables={json.dumps([split])}", "solve.targets={gap: -1}")
    arms = {
        "base": {"weights": None, "strength": 1.0, "rounds": 1},
        "half": {"weights": "plus", "strength": 0.5, "rounds": 1},
        "online": {"weights": "plus", "strength": 1.0, "rounds": 2},
        "permuted": {"weights": "permuted", "strength": 1.0, "rounds": 1},
    }
    solution = {
        "arms": {
            "plus": {"target": {"gap": -1.0, "held": 0.0}, "effective_sample_share": 0.5},
            "permuted": {"effective_sample_share": 0.5},
        }
    }
    windows = {"arms": {"half": {"outside": None}, "online": {"outside": "its weights change on the way"}}}
    names = ("gap", "gap:induction", "gap:rest", "overall")
    realised = {name: {"value": float(k), "interval": None} for k, name in enumerate(names)}
    found = {
        "solved": {"half": {"gap": {"value": -0.1}}},
        "predicted": {"half": {name: {"value": 7.0} for name in names}},
        "checked": {},
        "realised": {arm: realised for arm in ("half", "online", "permuted")},
    }
    rows = {(row["arm"], row["target"]): row for row in headline(config, solution, windows, arms, found)}
    # Weights that no arm is trained on are there; a control is held against what the others were to move.
    assert list(rows) == [("plus", "gap"), ("plus", "held"), ("half", "gap"), ("half", "held"), ("online", "gap"),
                          ("online", "held"), ("permuted", "gap")]  # fmt: skip
    row = rows["half", "gap"]
    assert row["asked"] == {"value": -1.0, "direction": "down"} and rows["half", "held"]["asked"]["direction"] == "hold"
    # A half of h has a quarter of its variance: 1 / (1 + 1 / 4).
    assert row["solved"] == {"value": -0.1, "share": 0.8}
    assert row["checked"] == {"missing": "stage check was not asked for"} and row["realised"]["value"] == 0
    assert {part: [k["value"] for k in kinds.values()] for part, kinds in row["parts"].items()} == {
        "gap:induction": [7, 1], "gap:rest": [7, 2]
    }  # fmt: skip
    assert row["cost"] == {"observable": "overall", "predicted": {"value": 7.0}, "realised": realised["overall"]}
    assert "outside the window" in rows["online", "gap"]["predicted"]["missing"]
    assert "change on the way" in rows["online", "gap"]["solved"]["missing"]
    assert rows["permuted", "gap"]["asked"] is None and rows["plus", "gap"]["realised"] == {
        "missing": "it is not retrained"
    }
    assert rows["half", "held"]["realised"] == {"missing": "it is no split loss"}


def test_of_a_target_that_no_training_has_the_losses_stand_beside_it(tiny_run: Path) -> None:
    split = {"kind": "split_loss", "name": "gap", "split": "induction_minus_rest"}
    own = [{"kind": "component_loss", "name": "component"}, {"kind": "free_energy", "name": "energy"}]
    config = tiny_config(
        tiny_run,
        f"sampling.observables={json.dumps([*own, split])}",
        "solve={scores: first_moment, component: everything, targets: {energy: 1}, effective_sample_share: 0.8}",
    )
    arms = {name: {"weights": name, "strength": 1.0, "rounds": 1} for name in ("plus", "permuted")}
    solution = {"arms": {"plus": {"target": {"energy": 1.0}, "effective_sample_share": 0.8}, "permuted": {}}}
    realised = {"gap": {"value": -0.5}, "overall": {"value": 0.1}}
    found = {"predicted": {}, "checked": {}, "realised": dict.fromkeys(arms, realised)}
    rows = headline(config, solution, {}, arms, found | {"solved": {"plus": {"energy": {"value": 3.0}}}})
    # A control has no row of the free energy: nothing is known of it.
    assert [(row["arm"], row["target"]) for row in rows] == [("plus", "energy"), ("plus", "gap"), ("permuted", "gap")]
    assert rows[0]["solved"]["value"] == 3 and rows[0]["realised"] == {"missing": "it is no split loss"}
    assert rows[1]["asked"] is None and rows[1]["realised"]["value"] == -0.5
    assert rows[1]["cost"]["realised"]["value"] == 0.1


def test_where_nothing_is_observed_on_held_out_samples_the_cost_is_the_validation_loss(tiny_run: Path) -> None:
    norm = {"kind": "function", "names": ["gap"], "path": "tiny_run:nan_above_a_threshold"}
    overrides = (f"sampling.observables={json.dumps([norm])}", "solve.targets={gap: -1}", "solve.scores=regression")
    config = tiny_config(tiny_run, *overrides, "response.direction=null")
    realised = {"plus": {"validation_loss": {"value": 0.2, "interval": [0.1, 0.3]}}}
    solution = {"arms": {"plus": {"target": {"gap": -1.0}}}}
    arms = {"plus": {"weights": "plus", "strength": 1.0, "rounds": 1}}
    (row,) = headline(config, solution, {}, arms, {"solved": {}, "predicted": {}, "checked": {}, "realised": realised})
    assert row["cost"] == {"observable": "validation_loss", "realised": realised["plus"]["validation_loss"]}


def test_diagnostics_are_of_the_strengths_and_rounds_that_are_asked_for(tmp_path: Path) -> None:
    rounds = [f"retrain/online/seed-0/round-{number}/everything" for number in (1, 2)]
    checks = [f"check/everything@{strength}" for strength in ("+0", "+1", "+2")]
    for subject in (*rounds, *checks):
        (tmp_path / "sampling" / subject).mkdir(parents=True)
        (tmp_path / "sampling" / subject / "diagnostics.json").write_text(json.dumps({"diagnostics": subject}))
    (tmp_path / "response").mkdir()
    (tmp_path / "response" / "diagnostics.json").write_text(json.dumps({"subjects": {"everything": "plain"}}))
    # Rounds were 3 and are 2, and a strength of 2 was checked before.
    checked = {"subject": "everything", "strengths": {"+1": {}}}
    online = {
        "online": {"subject": rounds[0], "replicates": {"of": "chains"}},
        "read": {"subject": "retrain/read/seed-0/round-1/annealed/everything", "replicates": {"of": "pairs of draws"}},
    }
    found = _diagnostics(tmp_path, checked, online)["subjects"]
    assert found == {"everything": "plain"} | {name: name for name in (checks[0], checks[1], rounds[0])}
    assert _diagnostics(tmp_path, {}, {})["subjects"] == {"everything": "plain"}


def test_importing_the_stage_imports_no_torch() -> None:
    code = "import sys, patterning_dist.stages.report; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
