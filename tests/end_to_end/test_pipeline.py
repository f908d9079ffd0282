"""The whole loop as a user runs it, and solved again another way."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_run import copy_run, quiet, tiny_config
from whole_run import events, invoke

from patterning_dist import open_run
from patterning_dist.errors import PatterningError
from patterning_dist.stages.sample import sample
from patterning_dist.status import Status

FROM_PYTHON = (Path(__file__).parents[2] / "docs/how_to/python.md").read_text(encoding="utf-8")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("local_ray")]


def test_summary_has_every_arm_with_intervals(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["arms"]) == {"base", "plus", "minus", "permuted"}
    contrast = summary["contrasts"]["plus"]["permuted"]["induction_gap"]
    low, high = contrast["interval"]
    assert low < contrast["value"] < high
    assert np.mean(contrast["per_seed"]) == pytest.approx(contrast["value"])
    assert set(summary["seconds"]) == {"prepare", "train", "sample", "solve", "retrain"}
    assert summary["solved"]["plus"]["induction"]["value"] < 0 < summary["solved"]["minus"]["induction"]["value"]
    assert "induction" in summary["realised"]["plus"]


def test_weights_of_all_arms_have_mean_one_and_the_control_the_same_values(finished: Path) -> None:
    tables = {arm: pq.read_table(finished / "weights" / f"{arm}.parquet") for arm in ("plus", "minus", "permuted")}
    for table in tables.values():
        assert table["weight"].to_numpy().astype(np.float64).mean() == pytest.approx(1, abs=1e-6)
    plus, permuted = (tables[arm]["weight"].to_numpy() for arm in ("plus", "permuted"))
    assert not np.array_equal(plus, permuted)
    np.testing.assert_array_equal(np.sort(plus), np.sort(permuted))
    share = plus.sum(dtype=np.float64) ** 2 / (plus.astype(np.float64) ** 2).sum() / len(plus)
    assert share == pytest.approx(0.7, abs=1e-4)


def test_arms_of_one_seed_start_from_the_same_weights(finished: Path) -> None:
    initial = [(finished / "retrain" / arm / "seed-1" / "initial.safetensors").read_bytes() for arm in ("base", "plus")]
    assert initial[0] == initial[1]
    other = (finished / "retrain" / "base" / "seed-0" / "initial.safetensors").read_bytes()
    assert other != initial[0]


def test_whoever_asks_is_told_what_the_run_did(finished: Path) -> None:
    status = Status.read(finished)
    assert status.live is not None and status.live.ended == "finished"
    heads = {"layer.0.head.1", "everything"}
    assert status.live.measured.keys() == heads
    diagnostics = json.loads((finished / "response/diagnostics.json").read_text())["subjects"]
    for name, values in status.live.measured.items():
        assert values["llc"] == diagnostics[name]["llc"]["value"]
        assert values["rhat"] == max(row["rhat"] for row in diagnostics[name]["observables"].values())
    said = [json.loads(line) for line in (finished / "events.jsonl").read_text().splitlines()]
    for kind in ("subject_started", "subject_finished"):
        assert {event["subject"] for event in said if event["kind"] == kind} == heads


def test_a_notebook_has_the_results_as_labelled_arrays(finished: Path) -> None:
    run = open_run(finished)
    chi = run.susceptibilities
    assert chi["chi"].dims == ("checkpoint", "component", "observable", "sample")
    table = pq.read_table(finished / "response/susceptibility-everything.parquet")
    row = chi.sel(checkpoint="baseline", component="everything", observable="induction")
    for ours, theirs in (("chi", "chi_induction"), ("standard_error", "se_induction"), ("token", "token")):
        np.testing.assert_array_equal(row[ours].values, table[theirs].to_numpy())
    assert "".join(chi["text"].values[:15]).strip() != ""
    assert run.llc.loc["everything", "llc"] == run.summary["chains"]["everything"]["llc"]["value"]
    assert run.chains["layer.0.head.1"]["induction"].dims == ("chain", "draw")
    assert set(run.weights) == {"plus", "minus", "permuted"}
    last = run.arms[run.arms.step == run.arms.step.max()]
    assert sorted(zip(last.arm, last.seed, strict=True)) == sorted(
        (arm, seed) for arm in ("base", "plus", "minus", "permuted") for seed in (0, 1)
    )
    (written,) = re.findall(
        r"^```python\n(from patterning_dist import open_run.*?)^```", FROM_PYTHON, re.MULTILINE | re.DOTALL
    )
    here = {"runs/quickstart": str(finished), "layer.1.head.0": "layer.0.head.1", "induction_gap": "induction"}
    for theirs, ours in here.items():
        assert theirs in written
        written = written.replace(theirs, ours)
    exec(compile(written, "python.md", "exec"), {})
    html = run._repr_html_()
    assert "everything" in html and "<td>plus</td>" in html and "retrain (finished)" in html
    assert "finished" in repr(run)


def test_what_is_not_done_is_said_where_it_is_asked_for(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(PatterningError, match="no run there"):
        open_run(tmp_path / "no")
    run = open_run(tiny_run)
    with pytest.raises(PatterningError, match="weights is not there, stage solve is not done"):
        _ = run.weights
    assert "<table" not in run._repr_html_()


@pytest.fixture(scope="module")
def changed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy for tests that run some of it again in another way; ``finished`` is read by other modules too."""
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("changed") / "run"))


def test_base_arm_of_the_baseline_seed_repeats_the_baseline(changed: Path, tiny_run: Path) -> None:
    """Same initialisation, data order and engine: before the annealing the two are one run."""
    again = invoke("run", tiny_run / "config.yaml", changed, "retrain.seeds=[3]", "retrain.arms=[base,plus]")
    assert again.exit_code == 0, again.output
    baseline = pq.read_table(changed / "baseline" / "metrics.parquet").to_pylist()
    arm = pq.read_table(changed / "retrain" / "base" / "seed-3" / "metrics.parquet").to_pylist()
    for expected, row in zip(baseline, arm, strict=False):
        assert row["step"] == expected["step"]
        assert row["validation_loss"] == expected["validation_loss"]


def test_solving_again_by_regression_keeps_the_chains(changed: Path, tiny_run: Path) -> None:
    overrides = ("solve.scores=regression", "solve.targets={component: -1}", "solve.min_reliability=-1")
    again = invoke("solve", tiny_run / "config.yaml", changed, *overrides)
    assert again.exit_code == 0, again.output
    solution = json.loads((changed / "weights" / "solution.json").read_text())
    assert solution["estimator"] == "regression"
    assert -1 <= solution["held_out_correlation"]["component"]["value"] <= 1
    assert events(changed).count(("sample", "finished")) == 1


def test_infeasible_strength_is_refused_with_the_largest_one_named(changed: Path, tiny_run: Path) -> None:
    overrides = ("solve.effective_sample_share=null", "solve.strength=1e6")
    refused = invoke("solve", tiny_run / "config.yaml", changed, *overrides)
    assert refused.exit_code == 2
    assert "largest feasible strength" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_a_stage_alone_is_refused_on_results_of_another_configuration(changed: Path, tiny_run: Path) -> None:
    refused = invoke("sample", tiny_run / "config.yaml", changed, "training.num_steps=7")
    assert refused.exit_code == 2
    assert "stage train, which is not done with this configuration" in refused.stderr


def test_exploding_step_size_is_an_error_before_anything_is_written(tiny_run: Path, tmp_path: Path) -> None:
    """All chains fail at once: one line that names the key, exit code 2, no response folder."""
    run = copy_run(tiny_run, tmp_path / "run")
    config = tiny_config(tiny_run, "sampling.localization=1e-6", "sampling.step_size=1e6")
    with pytest.raises(PatterningError, match=r"chains failed.*lower sampling\.step_size"):
        sample(config, run, quiet())
    assert not (run.path / "response").exists()
