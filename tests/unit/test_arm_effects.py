"""Ratios, shares of an oracle's effect and times to the circuit, from arms as they are read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tiny_run import copy_run, tiny_config

from patterning_dist.config import ArmConfig
from patterning_dist.progress import Progress
from patterning_dist.response.survival import Runs, hazard_ratio, log_rank
from patterning_dist.stages.arms import Arm, contrasts
from patterning_dist.stages.effects import add_ratios, head_ablations, oracle_shares, time_to_event
from patterning_dist.stages.frontier import frontier
from patterning_dist.stages.report import report
from patterning_dist.storage.run import RunDirectory
from patterning_dist.training.job import HELD_OUT_TABLE

ROOT_2 = 2**0.5


def arm(name: str, weights: Any, scores: list[float], steps: list[int | None] | None = None, **settings: Any) -> Arm:
    """An arm of one seed a score, 1 first; its gap is twice the score."""
    seeds = settings.pop("seeds", list(range(1, len(scores) + 1)))
    metrics = {"prefix_matching": np.array(scores), "gap": 2 * np.array(scores)}
    own = ArmConfig(name=name, weights=weights, seeds=seeds, start="initialisation", **settings)
    return Arm(own, metrics, {}, {}, np.zeros(0), steps, [900] * len(scores))


@pytest.fixture
def arms() -> list[Arm]:
    return [
        arm("base", None, [0.1, 0.1, 0.1], [600, None, None]),
        arm("plus", "plus", [0.8, 0.4, 0.2], [300, 300, 450]),
        arm("permuted", "permuted", [0.1, 0.2, 0.1], [None, None, None]),
        arm("oracle", "oracle", [0.4, 0.4], [150, 150], seeds=[2, 1]),
    ]


def test_a_ratio_is_a_geometric_mean_over_paired_seeds(arms: list[Arm]) -> None:
    found, _ = contrasts(arms)
    assert add_ratios(found, arms, ["prefix_matching", "absent"]) == []
    entry = found["plus"]["base"]["prefix_matching"]
    # Factors of 8, 4 and 2: logarithms ln 2 apart about ln 4, and t of two degrees of freedom is 4.3027.
    width = 2 ** (4.302652730 / 3**0.5)
    ratio = entry["ratio"]
    assert ratio["per_seed"] == pytest.approx([8, 4, 2]) and ratio["value"] == pytest.approx(4)
    assert ratio["interval"] == pytest.approx([4 / width, 4 * width]) and ratio["covers"] == ["seeds"]
    assert entry["value"] == pytest.approx(1.1 / 3)  # the difference stays beside it
    assert found["plus"]["permuted"]["prefix_matching"]["ratio"]["per_seed"] == pytest.approx([8, 2, 2])
    assert found["oracle"]["base"]["prefix_matching"]["ratio"]["value"] == pytest.approx(4)
    assert "ratio" not in found["plus"]["base"]["gap"]


def test_one_seed_has_a_ratio_without_an_interval() -> None:
    arms = [arm("base", None, [0.1]), arm("plus", "plus", [0.3])]
    found, _ = contrasts(arms)
    add_ratios(found, arms, ["prefix_matching"])
    ratio = found["plus"]["base"]["prefix_matching"]["ratio"]
    assert ratio["value"] == pytest.approx(3) and ratio["interval"] is None and ratio["covers"] == []


def test_a_score_of_zero_has_no_ratio_and_a_warning(tiny_run: Path, arms: list[Arm]) -> None:
    arms[0].metrics["prefix_matching"][1] = 0.0
    found, _ = contrasts(arms)
    warnings = add_ratios(found, arms, ["prefix_matching"])
    assert "ratio" not in found["plus"]["base"]["prefix_matching"]
    assert "ratio" in found["plus"]["permuted"]["prefix_matching"]
    assert [words.partition(":")[0] for words in warnings] == ["plus and base", "permuted and base", "oracle and base"]
    assert "prefix_matching is compared by differences alone, since it is 0 or below" in warnings[0]
    config = with_oracle(tiny_run)
    assert "prefix_matching" not in oracle_shares(config, arms, ["prefix_matching"])["oracle"]["plus"]


def with_oracle(tiny_run: Path) -> Any:
    return tiny_config(tiny_run, "solve.controls=[{kind: split, name: oracle, split: induction}]")


def test_shares_are_of_the_oracles_effect_on_the_seeds_that_all_three_have(tiny_run: Path, arms: list[Arm]) -> None:
    arms[3].metrics["prefix_matching"][:] = [0.4, 0.4 * ROOT_2]  # of seeds 2 and 1
    arms[3].metrics["gap"][:] = [0.6, 0.61]
    found = oracle_shares(with_oracle(tiny_run), arms, ["prefix_matching"])
    assert list(found) == ["oracle"] and list(found["oracle"]) == ["plus", "permuted"]
    plus = found["oracle"]["plus"]
    # In logarithms of 2, 3 and 2 over 2.5 and 2: the oracle's two seeds are too far apart for a share.
    assert plus["prefix_matching"] == {"value": None, "interval": None, "covers": ["seeds"], "seeds": [1, 2]}
    # Differences of 1.4 and .6 over .41 and .4.
    assert plus["gap"]["value"] == pytest.approx(2 / 0.81)
    low, high = plus["gap"]["interval"]
    assert low < 2 / 0.81 < high


def test_a_share_of_a_log_metric_is_of_logarithms(tiny_run: Path) -> None:
    names = (("base", [1, 1, 1]), ("plus", [4, 4, 4]), ("oracle", [8, 8, 8.001]))
    arms = [arm(name, None if name == "base" else name, [0.1 * one for one in scores]) for name, scores in names]
    shares = oracle_shares(with_oracle(tiny_run), arms, ["prefix_matching"])["oracle"]["plus"]
    assert shares["prefix_matching"]["value"] == pytest.approx(2 / 3, rel=1e-4)
    assert shares["gap"]["value"] == pytest.approx(3 / 7, rel=1e-4)


def test_an_oracle_is_held_against_arms_of_its_own_start_alone(tiny_run: Path, arms: list[Arm]) -> None:
    elsewhere = [one for one in arms if one.name != "base"]
    assert oracle_shares(with_oracle(tiny_run), elsewhere, []) == {}
    assert oracle_shares(tiny_config(tiny_run), arms, []) == {}  # no control is made of a split


def test_an_oracle_and_the_permuted_arm_are_held_against_arms_of_their_strength(tiny_run: Path) -> None:
    weights = [(name, s) for name in ("plus", "permuted", "oracle") for s in (0.5, 1.0)]
    arms = [arm(f"{name}-{s}", name, [0.4, 0.2], strength=s) for name, s in weights]
    found, unpaired = contrasts([arm("base", None, [0.1, 0.1]), *arms])
    assert list(found["plus-0.5"]) == ["base", "permuted-0.5"] and list(found["plus-1.0"]) == ["base", "permuted-1.0"]
    assert list(found["permuted-0.5"]) == ["base"] and not unpaired
    shares = oracle_shares(with_oracle(tiny_run), [arm("base", None, [0.1, 0.1]), *arms], [])
    assert {name: list(of) for name, of in shares.items()} == {
        f"oracle-{s}": [f"plus-{s}", f"permuted-{s}"] for s in (0.5, 1.0)
    }


def test_a_frontier_is_the_arms_of_a_row_by_strength() -> None:
    def made(name: str, weights: Any, **settings: Any) -> Arm:
        one = arm(name, weights, [0.2, 0.4], **settings)
        one.metrics.update(validation_loss=np.array([3.0, 3.1]), ablated_gap=np.array([0.1, 0.2]))
        return one

    arms = [
        made("base", None),
        made("strong", "plus", strength=1.0),
        made("weak", "plus", strength=0.5),
        made("drawn", "plus", strength=0.5, weighting="draw"),
        made("oracle", "oracle"),
        made("mine", Path("mine.parquet"), strength=2.0),
        made("elsewhere", "plus", seeds=[7, 8]),  # not compared with base
    ]
    found, _ = contrasts(arms)
    names = ("prefix_matching", "gap", "validation_loss", "ablated_gap", "absent", "gap:part", "wanted")
    described = {name: {"meaning": "" if name == "wanted" else "something"} for name in names}
    described["bare"] = {"meaning": ""}
    solved = {"plus": {"effective_sample_share": 0.8}, "oracle": {"effective_sample_share": 0.8}}
    drawn = frontier(arms, found, described, ["free_energy", "gap"], solved)
    assert drawn["cost"] == "validation_loss" and drawn["effects"] == ["gap", "prefix_matching"]
    assert {row: [point["arm"] for point in points] for row, points in drawn["rows"]["base"].items()} == {
        "plus": ["weak", "strong"],
        "drawn": ["drawn"],
        "oracle": ["oracle"],
        "mine.parquet": ["mine"],
    }
    weak, strong = drawn["rows"]["base"]["plus"]
    assert strong["share"] == pytest.approx(0.8)
    weights = 1 + 0.5 * np.array([0.5, -0.5])  # 1 + h of 0.5 and -0.5 has the share 1 / 1.25
    assert weak["share"] == pytest.approx(weights.sum() ** 2 / (2 * (weights**2).sum()))
    assert drawn["rows"]["base"]["mine.parquet"][0]["share"] is None
    assert frontier(arms[:2] + arms[3:5], found, described, [], solved) == {}  # no row has two strengths


def test_runs_without_a_head_are_censored_at_their_last_step(arms: list[Arm]) -> None:
    found = time_to_event([*arms, arm("unscored", "mine.parquet", [1.0])])
    assert list(found) == ["base", "plus", "permuted", "oracle"]
    base = found["base"]
    assert (base["runs"], base["events"], base["median"], base["against"]) == (3, 1, None, {})
    assert base["censored_at"].tolist() == [900, 900] and base["not_reached"]["share"] == pytest.approx([2 / 3])
    assert found["plus"]["median"] == 300 and list(found["plus"]["against"]) == ["base", "permuted"]
    ours = Runs(np.array([300.0, 300, 450]), np.full(3, True))
    theirs = Runs(np.array([600.0, 900, 900]), np.array([True, False, False]))
    against = found["plus"]["against"]["base"]
    assert against["p"] == log_rank(ours, theirs).p
    assert against["hazard_ratio"] == hazard_ratio(ours, theirs)._asdict()
    assert against["hazard_ratio"]["value"] == np.inf  # all three came before the first of base
    assert found["permuted"]["against"]["base"]["hazard_ratio"]["value"] == 0


def test_what_a_head_carries_is_the_rise_without_it_beyond_that_without_others() -> None:
    one, two = arm("base", None, [0.1, 0.1]), arm("plus", "plus", [0.8, 0.4])
    two.metrics.update(
        {
            "repeated_gap": np.array([-2.0, -1.0]),
            "ablated_gap": np.array([-0.5, -0.1]),
            "other_ablated_gap": np.array([-1.9, -1.0]),
        }
    )
    found = head_ablations([one, two])
    assert list(found) == ["plus"]  # of the other no head is known
    assert found["plus"]["induction_head"]["per_seed"] == pytest.approx([1.5, 0.9])
    assert found["plus"]["other_heads"]["value"] == pytest.approx(0.05)
    assert found["plus"]["difference"]["per_seed"] == pytest.approx([1.4, 0.9])
    # Half a range of 0.5 times t of one degree of freedom, 12.706.
    assert found["plus"]["difference"]["interval"] == pytest.approx([1.15 - 0.25 * 12.7062, 1.15 + 0.25 * 12.7062])


def write_training(run: RunDirectory, name: str, seed: int, scores: list[float]) -> None:
    folder = run.path / "retrain" / name / f"seed-{seed}"
    folder.mkdir(parents=True)
    metrics = {"step": [0, 3, 6], "train_loss": [6.0, 5, 4], "prefix_matching": scores, "seconds": [0.0, 1, 2]}
    pq.write_table(pa.table(metrics), folder / "metrics.parquet")
    pq.write_table(pa.table({"group": np.arange(4)}), folder / HELD_OUT_TABLE)
    ends = {"prefix_matching": scores[-1], "observables": {}}
    (folder / "evaluation.json").write_text(json.dumps(ends))


def test_the_stage_writes_all_three_and_says_the_ratios(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path)
    arms = "[base, plus, permuted, {name: oracle, weights: oracle}]"
    controls = "solve.controls=[{kind: split, name: oracle, split: induction}]"
    config = tiny_config(run.path, controls, f"retrain.arms={arms}", "retrain.seeds=[1, 2, 3]")
    for name, factor in {"base": 1, "plus": 4, "permuted": 1.01, "oracle": 8}.items():
        for seed, spread in ((1, 1.0), (2, 1.02), (3, 0.99)):
            at_base = 0.02 * seed  # what a seed is at without weights, and what pairing takes out
            end = at_base * factor * (1 if name == "base" else spread)
            write_training(run, name, seed, [0.01, 0.5 * end, end])
    run.update_manifest(stages={})
    (run.path / "weights").mkdir()
    (run.path / "weights/solution.json").write_text(json.dumps({"arms": {}}))
    (run.path / "response").mkdir()
    (run.path / "response/diagnostics.json").write_text(json.dumps({"subjects": {}, "modes": {}}))
    said = io.StringIO()
    report(config, run, Progress(Console(file=said, width=200)))
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["metrics"]["prefix_matching"]["scale"] == "log"
    ratio = summary["contrasts"]["plus"]["base"]["prefix_matching"]["ratio"]
    # The logarithms of 1, 1.02 and .99 have the mean .00325 and its standard error .00877; t is 4.3027.
    assert ratio["per_seed"] == pytest.approx([4, 4.08, 3.96])
    assert ratio["interval"] == pytest.approx([4 * np.exp(0.00325 - 0.03774), 4 * np.exp(0.00325 + 0.03774)], rel=1e-4)
    share = summary["oracle_shares"]["oracle"]["plus"]["prefix_matching"]
    assert share["value"] == pytest.approx(2 / 3, abs=0.01) and share["interval"] is not None
    plus = summary["time_to_event"]["plus"]
    assert (plus["events"], plus["median"]) == (2, 6) and plus["censored_at"] == [6]
    assert summary["time_to_event"]["base"]["events"] == 0
    # No run of base forms a head: the ratio of hazards has a lower end only.
    assert plus["against"]["base"]["hazard_ratio"]["value"] is None
    assert plus["against"]["base"]["hazard_ratio"]["interval"][1] is None
    told = said.getvalue().replace("\u00a0", " ")
    assert "plus: the prefix matching times 4.01 [3.86, 4.17] against base" in " ".join(told.split())
    assert "of the effect of oracle" in told
    page = (run.path / "report.html").read_text()
    assert "Step by which half of the runs have an induction head" in page and "cannot be drawn" not in page
