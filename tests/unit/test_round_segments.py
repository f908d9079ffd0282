"""Arms in rounds: what the file may ask for, how a training is cut up, and how its parts are one again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from patterning_dist.config import Config, load_config
from patterning_dist.driver import _fingerprints, experiment_of
from patterning_dist.errors import PatterningError
from patterning_dist.stages.rounds import joined_metrics, later_rounds, rounds_of

ONLINE = {"name": "online", "weights": "plus", "rounds": 3}
SETTINGS: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "model": {"kind": "module", "initialise": "unwritten:initialise", "per_sample_loss": "unwritten:losses"},
    "data": {"kind": "function", "load": "unwritten:load"},
    "training": {"num_steps": 100, "batch_size": 8, "optimizer": "adamw"},
    "sampling": {
        "components": [{"name": "everything"}],
        "observables": [{"kind": "split_loss", "name": "wanted", "split": "domain:test"}],
        "num_draws": 100,
        "burn_in": 10,
        "inverse_temperature": 30,
        "localization": 4,
        "step_size": 0.075,
    },
    "response": {"direction": {"component": "everything"}},
    "solve": {"component": "everything", "targets": {"wanted": -1}, "effective_sample_share": 0.5},
    "retrain": {"seeds": [4, 5], "num_steps": 7, "start": "baseline", "arms": ["base", "plus", ONLINE]},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(SETTINGS))
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["arms.2.rounds=8"], "has 8 rounds, more than retrain.num_steps = 7; lower its rounds"),
        (["arms.2.weights=permuted"], "it is the weights of plus or minus that are solved for again; set its weights"),
        (["arms.2.weights=mine.parquet"], "it is the weights of plus or minus that are solved for again"),
        (["arms.2.weights=null"], "it is the weights of plus or minus that are solved for again"),
        (["arms.2.weighted_share=0.5"], "the weighted loss that every round ends on; remove its weighted_share"),
        (["arms.2.strength=1.5"], "may be as small as solve.weight_min = 0; expected at most 1"),
    ],
)
def test_what_rounds_do_not_go_with_is_said(path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(PatterningError) as caught:
        load_config(path, [f"retrain.{change}" for change in changes])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_other_scores_cannot_be_made_under_weights(path: Path) -> None:
    with pytest.raises(PatterningError, match=r"online has 3 rounds, .* set solve.scores to response_direction or fir"):
        load_config(path, ["solve.scores=plain"])
    # Without rounds they can, and a strength is as it was.
    assert load_config(path, ["solve.scores=plain", "retrain.arms.2.rounds=1"])
    assert load_config(path, ["solve.weight_min=0.5", "retrain.arms.2.strength=2"])


def test_first_moments_are_read_off_an_annealed_copy_without_chains(path: Path) -> None:
    energy = "sampling.observables=[{kind: component_loss, name: own}, {kind: free_energy, name: wanted}]"
    moments = [energy, "solve.scores=first_moment", "response.direction=null"]
    with pytest.raises(PatterningError, match=r"online has 3 rounds, .* set training.anneal_steps"):
        load_config(path, moments)
    moments.append("training.anneal_steps=10")
    assert load_config(path, moments)
    with pytest.raises(PatterningError, match=r"online has 3 rounds, .* set solve.draws to antithetic"):
        load_config(path, [*moments, "solve.draws=chains"])


def test_rounds_share_out_the_steps_and_follow_each_other(path: Path) -> None:
    config = load_config(path)
    assert [part.name for part in rounds_of(config, 1)] == [
        "base seed 4", "plus seed 4", "online seed 4, round 1 of 3",
        "base seed 5", "plus seed 5", "online seed 5, round 1 of 3",
    ]  # fmt: skip
    base, plus, first = rounds_of(config, 1)[:3]
    assert (base.folder, base.weights, base.start) == ("retrain/base/seed-4", None, "baseline")
    assert (plus.folder, plus.weights, plus.num_steps(7)) == ("retrain/plus/seed-4", "weights/plus.parquet", 7)
    second, third = (rounds_of(config, number)[0] for number in (2, 3))
    assert [part.num_steps(7) for part in (first, second, third)] == [2, 2, 3]
    assert (first.weights, second.weights) == ("weights/plus.parquet", "retrain/online/seed-4/round-2/weights.parquet")
    assert [part.start for part in (first, second, third)] == ["baseline", first.folder, second.folder]
    assert second.before == first
    assert [part.number for part in later_rounds(config)] == [2, 2, 3, 3]
    fresh = load_config(path, ["retrain.start=initialisation"])
    assert [rounds_of(fresh, number)[-1].start for number in (1, 2)] == [None, "retrain/online/seed-5/round-1"]


def test_no_round_sees_the_data_of_another(path: Path) -> None:
    config = load_config(path)
    rounds = [part for number in (1, 2, 3) for part in rounds_of(config, number)]
    assert all(part.data_seed == part.seed for part in rounds if part.number == 1)
    later = [part.data_seed for part in rounds if part.number > 1]
    assert len({4, 5, *later}) == 6
    assert all(0 <= seed < 2**63 for seed in later)


def test_metrics_of_rounds_are_one_table() -> None:
    def table(steps: list[int], losses: list[float], seconds: list[float]) -> pa.Table:
        train = [float("nan"), *losses[1:]]
        return pa.table({"step": steps, "train_loss": train, "loss": losses, "seconds": seconds})

    rounds = [table([0, 2], [5.0, 4.0], [0.5, 1.0]), table([0, 1, 3], [4.0, 3.5, 3.0], [0.25, 0.5, 1.0])]
    joined = joined_metrics([*rounds, table([0, 2], [3.0, 2.0], [0.5, 2.0])])
    assert joined["step"].to_pylist() == [0, 2, 3, 5, 7]
    assert joined["loss"].to_pylist() == [5.0, 4.0, 3.5, 3.0, 2.0]
    assert joined["seconds"].to_pylist() == [0.5, 1.0, 1.5, 2.0, 4.0]
    assert np.isnan(joined["train_loss"].to_numpy()).tolist() == [True, False, False, False, False]
    assert joined.schema == rounds[0].schema


def test_another_number_of_rounds_is_another_retraining_and_nothing_else(path: Path) -> None:
    def fingerprints(config: Config) -> dict[str, str]:
        experiment = experiment_of(config)
        return _fingerprints(experiment, config, experiment.inputs(config, {}))

    before = fingerprints(load_config(path))
    after = fingerprints(load_config(path, ["retrain.arms.2.rounds=2"]))
    assert [stage for stage in before if before[stage] != after[stage]] == ["retrain", "report"]
    assert list(before) == ["train", "sample", "solve", "retrain", "report"]
