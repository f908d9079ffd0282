"""Ratios, shares of an oracle's effect and times to the circuit, from arms as they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import tiny_config

from patterning_dist.config import ArmConfig
from patterning_dist.response.survival import Runs, hazard_ratio, log_rank
from patterning_dist.stages.arms import Arm, contrasts
from patterning_dist.stages.effects import add_ratios, oracle_shares, time_to_event

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
