"""What one kind of task can do, all can: every kind through every stage, or a sentence that says why not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from golden import runs
from golden.compare import Compare
from matrix_kinds import KINDS
from typer.testing import CliRunner

from patterning_dist.cli import app

pytestmark = pytest.mark.usefixtures("local_ray")
LANGUAGE_MODELS = ("attention_only", "gpt_neox", "llama")
IN_ROUNDS = ("gpt_neox",)
REFUSED = {("brackets", "plan"), ("brackets", "calibrate")}


@pytest.fixture(scope="module", params=list(KINDS))
def finished(request, tmp_path_factory):
    """Kind, experiment file and run directory of a kind that has been through all its stages."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    file, directory = folder / "experiment.yaml", folder / "run"
    file.write_text(yaml.safe_dump(KINDS[kind](folder), sort_keys=False))
    command("run", file, directory)
    return kind, file, directory


def command(name: str, file: Path, directory: Path) -> str:
    result = CliRunner().invoke(app, [name, str(file), "--run-dir", str(directory)])
    assert result.exit_code == 0, result.output
    return result.output


def stages_of(directory: Path) -> dict[str, str]:
    manifest = json.loads((directory / "manifest.json").read_text())
    return {stage: entry["status"] for stage, entry in manifest["stages"].items()}


def test_every_stage_that_is_asked_for_runs(finished):
    kind, _, directory = finished
    wanted = {"sample", "solve", "retrain", "report"} | ({"check"} if kind != "brackets" else set())
    wanted |= {"train"} if kind != "llama" else set()
    stages = stages_of(directory)
    assert wanted <= set(stages)
    assert set(stages.values()) == {"finished"}


def test_numbers_are_those_of_before(finished, golden: Compare):
    kind, _, directory = finished
    golden(kind, runs.brackets(directory) if kind == "brackets" else runs.loop(directory))


def test_measure(finished):
    _, _, directory = finished
    diagnostics = json.loads((directory / "response" / "diagnostics.json").read_text())["subjects"]
    assert diagnostics
    for subject in diagnostics.values():
        assert {"observables", "llc", "findings", "num_chains"} <= set(subject)


def test_pool_scores_solve_and_check(finished):
    kind, _, directory = finished
    solution = json.loads((directory / "weights" / "solution.json").read_text())
    assert solution["arms"]
    if kind == "brackets":  # all strings are the probe: there is no pool beyond it
        return
    pool = pq.read_table(directory / "response" / "pool.parquet")
    weights = pq.read_table(directory / "weights" / "plus.parquet")
    assert pool.num_rows == weights.num_rows > 0
    keys = ["sequence_id", "position"] if kind in LANGUAGE_MODELS else ["sample_id"]
    assert weights.select(keys).equals(pool.select(keys))
    if kind == "llama":  # pads have no weight, and tokens as much as they have in the data
        assert pool.num_rows < 30 * 11
        rows = pq.read_table(directory.parent / "train.parquet")["input_ids"].to_pylist()
        where = zip(weights["sequence_id"].to_pylist(), weights["position"].to_pylist(), strict=True)
        tokens = np.array([rows[sequence][position] for sequence, position in where])
        change = weights["weight"].to_numpy().astype(float) - 1
        assert np.abs(change).max() > 0.1
        assert np.abs(np.bincount(tokens, change)).max() < 1e-5  # of float32 weights
        kept = ["plus", "minus", "permuted"]
        assert solution["kept_mass"] == {"of": "token", "num_groups": len(set(tokens)), "arms": kept}
        assert (
            "Plus, minus and permuted keep the sum of weights of every token, "
            in (directory / "report.html").read_text()
        )
    checked = json.loads((directory / "check" / "response.json").read_text())
    for name in ("wanted", "component", "llc", "free_energy"):
        assert set(checked["strengths"]["+1"][name]) >= {"value", "standard_error", "interval", "predicted"}
        slope = checked["slopes"][name]
        assert slope["strength"] == 0.2 and slope["verdict"] in ("agrees", "disagrees", "not resolved")
        assert None not in (slope["value"], slope["standard_error"], slope["predicted"], slope["z"])


def test_retrain_and_report(finished):
    kind, _, directory = finished
    summary = json.loads((directory / "summary.json").read_text())
    assert (directory / "report.html").stat().st_size > 5_000
    if kind != "brackets":
        arms = [path.parent.parent.name for path in directory.glob("retrain/*/seed-0/evaluation.json")]
        assert sorted(arms) == sorted(["base", "permuted", "plus", *(["online"] if kind in IN_ROUNDS else [])])
        assert set(summary["arms"]) == set(arms)
        observables = json.loads((directory / "retrain/plus/seed-0/evaluation.json").read_text())["observables"]
        terms = {name for name in observables if name.startswith("wanted:")}
        assert set(observables) == {"wanted", "overall", *terms} and len(terms) == 2 * (kind == "attention_only")
    if kind in IN_ROUNDS:
        steps = pq.read_table(directory / "retrain/online/seed-0/metrics.parquet")["step"].to_pylist()
        assert steps == [0, 1, 3]  # one step, then two
        assert "online" in summary["contrasts"] and list(summary["rounds"]) == ["online seed 0, round 2 of 2"]


def test_plan(finished):
    plan_or_calibrate(finished, "plan")


@pytest.mark.extended  # for all kinds; those of a network and of a study in `test_calibrate`
def test_calibrate(finished):
    plan_or_calibrate(finished, "calibrate")


def plan_or_calibrate(finished, name):
    kind, file, directory = finished
    result = CliRunner().invoke(app, [name, str(file), "--run-dir", str(directory)])
    if (kind, name) not in REFUSED:
        # So few draws need not find a setting that can be used: then the page says why.
        assert result.exit_code == 0 or re.search(r"none of \d+ settings can be used", result.output), result.output
        assert name == "plan" or (directory / "calibration" / "report.html").exists()
        return
    assert result.exit_code == 2
    assert "parentheses" in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_nothing_is_done_twice(finished):
    _, file, directory = finished
    output = command("run", file, directory)
    assert output.count("done before, inputs unchanged") == len(stages_of(directory))
