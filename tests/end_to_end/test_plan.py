"""`patterning plan` probes the real pieces, writes nothing into the run directory, and counts what is done as done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from study_models import make_study
from typer.testing import CliRunner

from patterning_dist.cli import app
from patterning_dist.config import load_config
from patterning_dist.driver import run_stages
from patterning_dist.storage.run import STAGES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def files(folder: Path) -> dict[str, tuple[int, int]]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def plan(*arguments: str) -> dict:
    result = CliRunner().invoke(app, ["plan", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def experiment(tiny_run: Path) -> Path:
    return tiny_run / "config.yaml"


def test_a_run_that_is_prepared(experiment: Path, local_ray: None, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    run_stages(load_config(experiment), ["prepare"], directory)
    before = files(directory)
    found = plan(str(experiment), "--run-dir", str(directory))
    assert files(directory) == before

    stages = {stage["name"]: stage for stage in found["stages"]}
    assert [name for name in stages if name != "start"] == list(STAGES)
    assert stages["prepare"]["is_done"] and stages["prepare"]["seconds"]["value"] == 0
    for name in STAGES[1:]:
        low, value, high = (stages[name]["seconds"][end] for end in ("low", "value", "high"))
        assert 0 < low <= value <= high, name
    # 2 components, 3 chains of 12 draws each, 5 draws a push; 3 + 11 * 2 steps.
    details = stages["sample"]["details"]
    expected = {"num_chains": 6, "num_draws": 72, "num_pushes": 18, "num_steps": 150}
    assert {key: details[key] for key in expected} == expected
    assert details["weight_bytes"] == 4 * num_parameters(experiment)
    assert details["activation_bytes"] > 0 and details["gradient_bytes"] == details["weight_bytes"]
    # Muon keeps one number a weight of a head, Adam two of the others, so the state is between one and two weights.
    training = stages["train"]["details"]
    assert training["weight_bytes"] < training["optimizer_bytes"] < 2.1 * training["weight_bytes"]
    assert found["cluster"]["CPU"] == 2 and stages["retrain"]["processes"] == 2
    assert found["total"]["disk_bytes"] == sum(s["disk_bytes"] for s in found["stages"] if not s["is_done"])
    assert found["total"]["seconds"]["value"] == pytest.approx(sum(s["seconds"]["value"] for s in found["stages"]))


def num_parameters(experiment: Path) -> int:
    from tiny_run import checkpoint

    return sum(p.numel() for p in checkpoint(load_config(experiment), experiment.parent).parameters())


def test_a_study(local_ray: None, tmp_path: Path) -> None:
    file = make_study(tmp_path)
    directory = tmp_path / "run"
    found = plan(str(file), "--run-dir", str(directory))
    assert not directory.exists()
    (stage,) = found["stages"]
    # 2 checkpoints of 2 components, 3 chains of 16 draws each; 4 + 15 * 2 steps.
    details = stage["details"]
    assert (details["num_chains"], details["num_draws"], details["num_steps"]) == (12, 192, 12 * 34)
    assert stage["seconds"]["value"] > 0 and details["activation_bytes"] > 0


def test_what_a_run_would_refuse_is_refused(experiment: Path, tmp_path: Path) -> None:
    arguments = ["plan", str(experiment), "--run-dir", str(tmp_path / "run"), "--set", "device=cuda"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "device: cuda was asked for" in result.stderr
    assert not (tmp_path / "run").exists()
