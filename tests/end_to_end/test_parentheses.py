"""The parentheses experiment by its command: stopped twice, resumed, and every number of its summary there."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from interrupting import interrupted
from typer.testing import CliRunner

from patterning_dist.cli import app

pytestmark = [pytest.mark.slow, pytest.mark.extended, pytest.mark.timeout(600)]

CONFIG = Path(__file__).parents[2] / "configs" / "parentheses-small.yaml"
# Even less training: rough networks, of which some follow either rule more than others.
OVERRIDES = (
    "training.num_steps=300",
    "training.seeds_per_task=8",
    "training.weight_decay=1.5",
    "references={num_seeds: 16, per_rule: 2, nested_above: 0.75, equal_count_below: 0.7, train_accuracy: 0.7}",
    "sampling.num_draws=20",
    "sampling.burn_in=50",
    "sampling.steps_between_draws=2",
    "arms={num_seeds: 8, num_control_seeds: 4, num_shuffles: 1}",
    "check={strengths: [-1.0, 1.0], per_rule: 2}",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> tuple[Path, str]:
    """A run that was stopped while its networks were trained, and again while it sampled; what it said at last."""
    directory = tmp_path_factory.mktemp("parentheses") / "run"
    options = [argument for override in OVERRIDES for argument in ("--set", override)]

    def run() -> Result:
        return CliRunner().invoke(app, ["run", str(CONFIG), "--run-dir", str(directory), *options])

    for awaited, sent, code in (
        ("baseline/stacks/*.npz", signal.SIGTERM, 143),
        ("sampling/*/shard-0/chain-*", signal.SIGINT, 130),
    ):
        stopped = interrupted(run, lambda awaited=awaited: any(directory.glob(awaited)), sent)
        assert stopped.exit_code == code, stopped.output
    last = run()
    assert last.exit_code == 0, last.output
    return directory, last.output


def test_what_was_done_is_kept(finished: tuple[Path, str]) -> None:
    directory, said = finished
    lines = (directory / "events.jsonl").read_text().splitlines()
    found = [(event["stage"], event["kind"]) for event in map(json.loads, lines)]
    assert found.count(("prepare", "started")) == 1
    assert found.count(("train", "started")) == 2
    assert ("sample", "subject_resumed") in found
    assert "train: done before, inputs unchanged" in said


def test_every_arm_is_there_with_its_interval(finished: tuple[Path, str]) -> None:
    summary = json.loads((finished[0] / "summary.json").read_text())
    main = ["base", "nested", "equal_count", "online_nested", "online_equal_count"]
    assert list(summary["arms"])[:5] == main
    assert len(summary["arms"]) == 15
    for arm, entry in summary["arms"].items():
        assert entry["num_networks"] == len(entry["rejected"]["per_seed"]) == (8 if arm in main else 4)
        low, high = entry["rejected"]["interval"]
        assert low < entry["rejected"]["value"] < high
    assert summary["arms"]["base"]["difference_from_base"]["value"] == 0
    contrasts = {(entry["arm"], entry["other"]): entry for entry in summary["contrasts"]}
    first, second = (summary["arms"][arm]["rejected"]["per_seed"] for arm in ("nested", "llc_nested"))
    paired = np.subtract(first[:4], second)
    assert contrasts["nested", "llc_nested"]["num_networks"] == 4
    assert contrasts["nested", "llc_nested"]["difference"]["value"] == pytest.approx(paired.mean())
    assert contrasts["online_nested", "nested"]["num_networks"] == 8


def test_arms_are_paired_and_base_is_plain(finished: tuple[Path, str]) -> None:
    folder = finished[0] / "retrain"
    tables = {path.name: pq.read_table(path / "networks.parquet") for path in folder.iterdir() if path.name != "stacks"}
    seeds = tables["base"]["seed"].to_numpy()
    for table in tables.values():
        assert (table["seed"].to_numpy() == seeds[: table.num_rows]).all()
    pool = pq.read_table(finished[0] / "baseline" / "networks.parquet")
    assert not set(pool["seed"].to_pylist()) & set(seeds.tolist()), "never the networks that were chosen from"
    for path in (finished[0] / "rounds").glob("*/networks.parquet"):
        assert not set(pq.read_table(path)["seed"].to_pylist()) & set(seeds.tolist()), "nor those of a round"


def test_weights_keep_the_labels_and_the_effective_share(finished: tuple[Path, str]) -> None:
    for file in (finished[0] / "weights").glob("*.parquet"):
        table = pq.read_table(file)
        relative, label = table["relative_weight"].to_numpy(), table["label"].to_numpy()
        for value in (0, 1):
            assert relative[label == value].mean() == pytest.approx(1, abs=1e-6)
        assert relative.min() >= 0.1 - 1e-9
        share = relative.sum() ** 2 / (len(relative) * (relative @ relative))
        assert share == pytest.approx(0.4, abs=1e-4)
    nested, permuted = (
        pq.read_table(finished[0] / "weights" / f"{arm}.parquet")["relative_weight"].to_numpy()
        for arm in ("nested", "permuted")
    )
    assert np.sort(nested) == pytest.approx(np.sort(permuted))
    assert abs(np.corrcoef(nested, permuted)[0, 1]) < 0.1


def test_a_round_adds_what_it_measured(finished: tuple[Path, str]) -> None:
    summary = json.loads((finished[0] / "summary.json").read_text())
    rounds = {entry["round"]: entry for entry in summary["rounds"]}
    assert list(rounds) == ["plain", "toward_nested_1", "toward_equal_count_1"]
    strings = pq.read_table(finished[0] / "weights" / "nested.parquet")
    for rule, sign in (("nested", 1), ("equal_count", -1)):
        found = rounds[f"toward_{rule}_1"]
        rejected = {
            side: [network["rejected"] for network in found["references"] if network["rule"] == side]
            for side in ("nested", "equal_count")
        }
        assert len(rejected["nested"]) == len(rejected["equal_count"]) == 2
        assert min(rejected["nested"]) >= max(rejected["equal_count"])
        online = pq.read_table(finished[0] / "weights" / f"online_{rule}.parquet")["score"].to_numpy()
        # Old and new direction of equal size: the sum keeps sqrt((1 + r) / 2) of either, r their correlation. So it is
        # label by label, and their correlations differ somewhat.
        kept = np.corrcoef(sign * strings["score"].to_numpy(), online)[0, 1]
        assert kept == pytest.approx(np.sqrt((1 + found["correlation_with_score"]) / 2), abs=0.03)


def test_prediction_is_compared_with_measurement_on_other_references(finished: tuple[Path, str]) -> None:
    summary = json.loads((finished[0] / "summary.json").read_text())
    references = json.loads((finished[0] / "baseline" / "references.json").read_text())
    assert [(r["rule"], r["is_held_out"]) for r in references] == [
        (rule, is_held_out) for is_held_out in (False, True) for rule in ("nested", "equal_count") for _ in range(2)
    ]
    assert len({r["index"] for r in references}) == 8
    widths = {"measured": 0.0, "difference": 0.0}
    for row in summary["check"]:
        found = {kind: row[kind]["value"] for kind in ("linear", "measured", "difference")}
        assert found["measured"] - found["linear"] == pytest.approx(found["difference"])
        if row["quantity"] == "free_energy":
            widths = {kind: width + np.ptp(row[kind]["interval"]) for kind, width in widths.items()}
    # Of the same noise and minibatches: with other ones the differences are as uncertain as what is measured. Single
    # rows are of two networks, so the sum over rows counts.
    assert widths["difference"] < widths["measured"]
    assert {(row["rule"], row["strength"], row["quantity"]) for row in summary["check"]} == {
        (rule, strength, quantity)
        for rule in ("nested", "equal_count")
        for strength in (-1.0, 1.0)
        for quantity in ("llc", "free_energy")
    }
    page = (finished[0] / "report.html").read_text()
    for words in (
        "toward EQUAL-COUNT",
        "Predicted and measured",
        "The strings that decide",
        "loss contrast, NESTED",
        "The rounds",
    ):
        assert words in page
