"""`patterning calibrate` on a tiny run: a step size too large, trials taken up again, and the config it writes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import Result
from study_models import make_study, study_config
from tiny_run import checkpoint, copy_run, finish_inputs, tiny_config
from typer.testing import CliRunner

from patterning_dist.cli import app
from patterning_dist.config import load_config
from patterning_dist.stages.calibration_subject import calibrated_subject
from patterning_dist.storage.run import RunDirectory

pytestmark = pytest.mark.slow

# eps P is 2 and a little at the larger step: stiff directions are twice as wide as they should be.
GRID = [
    "calibration.component=everything",
    "calibration.step_sizes=[2e-3, 1e-2]",
    "calibration.inverse_temperatures=[1, 2]",
    "calibration.localizations=[200]",
    "calibration.num_chains=3",
    "calibration.num_draws=24",
    "calibration.steps_between_draws=5",
    "calibration.standard_error=0.5",
]
TASKS = 2 * 2 * 3


def command(directory: Path, *overrides: str) -> Result:
    """`patterning calibrate DIRECTORY` with the grid above."""
    options = [argument for override in (*GRID, *overrides) for argument in ("--set", override)]
    return CliRunner().invoke(app, ["calibrate", str(directory), *options])


def again(directory: Path) -> str:
    """The same command once more; returns what it said."""
    result = command(directory)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def calibrated(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> tuple[Path, str]:
    """The directory of a calibrated run, and what was said."""
    run = copy_run(tiny_run, tmp_path_factory.mktemp("calibrate"))
    config = tiny_config(run.path)
    finish_inputs(config, run)
    return run.path, again(run.path)


def stored(directory: Path) -> list[dict]:
    return json.loads((directory / "calibration" / "settings.json").read_text())


def test_the_setting_that_is_biased_is_ranked_last_and_named(calibrated: tuple[Path, str]) -> None:
    directory, said = calibrated
    found = stored(directory)
    assert [one["failure"] for one in found] == ["", "", "biased", "biased"]
    assert {one["setting"]["step_size"] for one in found[2:]} == {1e-2}
    assert "lower step_size to" in found[-1]["reason"]
    assert all(one["temperature_stiff"]["value"] > 1.2 for one in found[2:])
    assert all(one["step_bias"]["value"] < other["step_bias"]["value"] for one in found[:2] for other in found[2:])
    assert found[-1]["usable_per_second"] == 0 < found[0]["usable_per_second"]
    assert found[0]["reliability"] >= found[1]["reliability"]
    assert "calibrate: 2 of 4 settings are usable" in said
    assert "for chi of every observable" in said and "to 0.5 of its spread, 2 subject(s) of 3 chains" in said


def test_every_trial_starts_at_the_checkpoint_and_times_its_steps(calibrated: tuple[Path, str]) -> None:
    files = sorted((calibrated[0] / "calibration" / "trials").iterdir())
    assert len(files) == TASKS + 1 and files.pop(0).name == "curvature.npz"
    with np.load(files[0]) as trial:
        assert trial["mean_loss"][0] == 0 and np.all(trial["losses"][0] == 0)
        assert trial["losses"].shape == (24, 6) and trial["observables"].shape == (24, 3)
        # The means of the samples, not of single tokens.
        np.testing.assert_allclose(trial["losses"].mean(axis=1), trial["mean_loss"], atol=1e-6)
        header = json.loads(str(trial["header"]))
    assert header["step_seconds"] > 0 and header["draw_seconds"] > 0 and header["num_workers"] == 2
    model = checkpoint(tiny_config(calibrated[0]), calibrated[0])
    assert header["num_coordinates"] == sum(w.numel() for w in model.parameters())


def test_the_page_holds_everything_it_shows(calibrated: tuple[Path, str]) -> None:
    page = (calibrated[0] / "calibration" / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "step_size 0.01: biased" in page and "Curvature of the loss at the checkpoint (Lanczos): from" in page
    assert "say what is estimated: another pair is another posterior" in page
    assert "How long a full run takes" in page and "Predicted from short trials" in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_written_config_is_the_users_with_the_measured_values(calibrated: tuple[Path, str]) -> None:
    directory, _ = calibrated
    file = directory / "calibration" / "calibrated.yaml"
    before, after = tiny_config(directory, *GRID), load_config(file)
    best = stored(directory)[0]
    for key, value in best["setting"].items():
        assert getattr(after.sampling, key) == value
    # Five autocorrelation times of the slowest observable, five steps a draw; that is more than the loss needs.
    correlated = best["num_chains"] * best["num_draws"] / best["effective_draws"]
    assert after.sampling.burn_in == 5 * math.ceil(5 * max(1, correlated)) > 5 * best["burn_in"]
    assert after.sampling.steps_between_draws % 5 == 0
    assert after.sampling.num_draws >= 2 * after.sampling.num_batches
    changed = {key for key, value in after.sampling if value != getattr(before.sampling, key)}
    assert changed <= {
        "step_size",
        "inverse_temperature",
        "localization",
        "burn_in",
        "steps_between_draws",
        "num_draws",
        "lanczos_steps",
    }
    assert {"step_size", "inverse_temperature", "localization"} <= changed
    assert {key for key, value in after if value != getattr(before, key)} == {"sampling", "run_dir"}
    assert after.run_dir == directory, "so that the run goes on where its checkpoint is"
    comments = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert "4 settings of 3 chains of 24 draws on everything" in comments[0]
    assert any("sampling.step_size: 0.001 -> 0.002" in line for line in comments)
    assert yaml.safe_load(file.read_text())["calibration"]["num_chains"] == 3


def test_the_same_command_goes_on_from_the_trials_that_are_done(calibrated: tuple[Path, str]) -> None:
    directory, _ = calibrated
    ranking = stored(directory)
    files = sorted((directory / "calibration" / "trials").glob("eps*"))
    files[7].write_bytes(files[7].read_bytes()[:200])  # torn
    kept = {file: file.stat().st_mtime_ns for file in files if file != files[7]}
    assert f"{TASKS - 1} of {TASKS} trials were done before" in again(directory)
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    assert f"{TASKS} of {TASKS} trials were done before" in again(directory)
    # The same chains again: only what was timed may differ.
    for one, other in zip(ranking, stored(directory), strict=True):
        assert one["setting"] == other["setting"] and one["llc"] == other["llc"]


def test_trials_belong_to_what_they_follow_from(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path)

    def inputs(*overrides: str) -> str:
        return calibrated_subject(tiny_config(run.path, *overrides), run).inputs

    usual = inputs()
    assert inputs("sampling.step_size=5e-3", "sampling.num_draws=100", "sampling.workers=1") == usual
    assert inputs("sampling.batch_size=2") != usual
    assert inputs("calibration.component=everything") != usual
    assert inputs("sampling.sampler={kind: sgnht}") != usual
    weights = run.path / "baseline" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert inputs() != usual


def test_a_grid_without_a_usable_setting_is_an_error_and_leaves_no_config(
    calibrated: tuple[Path, str], tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(calibrated[0], directory)
    hopeless = command(directory, "calibration.step_sizes=[1e-2]")
    assert hopeless.exit_code == 2
    assert "report.html: none of 2 settings can be used (2 biased)" in hopeless.output
    assert "No setting is usable" in (directory / "calibration" / "report.html").read_text()
    assert not (directory / "calibration" / "calibrated.yaml").exists()
    refused = command(directory, "calibration.step_sizes=[0.03]")
    assert "nothing is left to try" in refused.output and "which must diverge" in refused.output


def test_the_command_asks_for_the_baseline_of_this_configuration(
    calibrated: tuple[Path, str], tiny_run: Path, tmp_path: Path
) -> None:
    directory = copy_run(tiny_run, tmp_path).path
    refused = command(directory)
    assert refused.exit_code == 2
    assert "calibrate needs stage prepare, which is not done with this configuration" in refused.output
    assert not (directory / "calibration").exists()
    stale = command(calibrated[0], "training.num_steps=7")
    assert stale.exit_code == 2
    assert "needs stage train, which is not done with this configuration" in stale.output
    wrong = command(directory, "calibration.component=attention")
    assert "calibration.component: 'attention' is not sampled; there are layer.0.head.1, everything" in wrong.output


def test_chains_of_a_study_are_calibrated_at_the_checkpoint_that_is_asked_for(local_ray: None, tmp_path: Path) -> None:
    """Nothing has to be done before: the checkpoints are there."""
    file, directory = make_study(tmp_path), tmp_path / "run"
    grid = (
        "calibration.checkpoint=early",
        "calibration.component=layer.1.mlp",
        "calibration.step_sizes=[3e-4]",
        "calibration.inverse_temperatures=[1]",
        "calibration.localizations=[1000]",
        "calibration.num_chains=2",
        "calibration.num_draws=48",
        "calibration.steps_between_draws=4",
        "calibration.standard_error=0.5",
    )
    options = [argument for override in grid for argument in ("--set", override)]
    result = CliRunner().invoke(app, ["calibrate", str(file), "--run-dir", str(directory), *options])
    assert result.exit_code == 0, result.output
    (found,) = stored(directory)
    assert found["failure"] == "" and found["setting"]["step_size"] == 3e-4
    assert "4 subject(s) of 3 chains" in result.output
    # Another checkpoint is another set of chains.
    inputs = {
        checkpoint: calibrated_subject(
            study_config(file, *grid, f"calibration.checkpoint={checkpoint}"), RunDirectory(directory)
        )
        for checkpoint in ("early", "final")
    }
    assert inputs["early"].name == "early/layer.1.mlp" and inputs["early"].inputs != inputs["final"].inputs
    assert (directory / "calibration" / "calibrated.yaml").is_file()
