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

STAGES = ("prepare", "train", "sample", "solve", "retrain", "report")  # of the tiny run

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


def test_retrainings_in_a_stack(experiment: Path, local_ray: None, tmp_path: Path) -> None:
    overrides = ("--set", "retrain.engine=stacked", "--set", "retrain.seeds=[0,1,2]", "--set", "retrain.arms=[base]")
    found = plan(str(experiment), "--run-dir", str(tmp_path / "run"), *overrides)
    stages = {stage["name"]: stage for stage in found["stages"]}
    weights = 4 * num_parameters(experiment)
    assert stages["train"]["details"]["weight_bytes"] == weights
    assert stages["retrain"]["details"]["weight_bytes"] == 3 * weights and stages["retrain"]["processes"] == 1
    assert stages["retrain"]["disk_bytes"] == 3 * 2 * weights
    assert "3 trainings of 6 steps, the seeds of an arm in a stack, 1 at once" in stages["retrain"]["what"]


def num_parameters(experiment: Path) -> int:
    from tiny_run import checkpoint

    return sum(p.numel() for p in checkpoint(load_config(experiment), experiment.parent).parameters())


def test_a_study(local_ray: None, tmp_path: Path) -> None:
    file = make_study(tmp_path)
    directory = tmp_path / "run"
    found = plan(str(file), "--run-dir", str(directory))
    assert not directory.exists()
    _, stage, page = found["stages"]
    assert (stage["name"], page["name"]) == ("sample", "report")
    # 2 checkpoints of 2 components, 3 chains of 16 draws each; 4 + 15 * 2 steps.
    details = stage["details"]
    assert (details["num_chains"], details["num_draws"], details["num_steps"]) == (12, 192, 12 * 34)
    assert stage["seconds"]["value"] > 0 and details["activation_bytes"] > 0


def test_the_whole_loop_of_a_language_model_that_exists(local_ray: None, tmp_path: Path) -> None:
    """Continued from a checkpoint: nothing is prepared or trained, and the check costs what its chains cost."""
    file = make_study(tmp_path)
    solve = "{component: layer.1.mlp, checkpoint: final, scores: %s, targets: {up: -0.01}, effective_sample_share: 0.7"
    solve += ", weight_max: 2}"
    overrides = (
        "response.direction={component: layer.1.mlp, hessian_sequences: 8}",
        f"solve={solve % 'response_direction'}",
        "check.strengths=[-1, 0.5, 1]",
        "training={batch_size: 4, optimizer: adamw, evaluation_sequences: 4}",
        "predict={gradient_sequences: 248, segments: 3}",
        "retrain={seeds: [0, 1], num_steps: 4, evaluate_every: 2, start: final}",
        "retrain.arms=[base, {name: long, weights: plus, seeds: [0]}, {name: online, weights: plus, rounds: 2}]",
        "validation={start: final, component: layer.1.mlp, methods: [gradient], num_queries: 2, num_subsets: 5, "
        "num_steps: 3, seeds: [0, 1]}",
    )
    options = [argument for override in overrides for argument in ("--set", override)]
    found = plan(str(file), "--run-dir", str(tmp_path / "run"), *options)
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["start", "sample", "solve", "check", "predict", "retrain", "validate", "report"]
    for stage in stages.values():
        assert 0 < stage["seconds"]["low"] <= stage["seconds"]["value"] <= stage["seconds"]["high"], stage["name"]
    check, sample = stages["check"]["details"], stages["sample"]["details"]
    # 0 and 3 strengths of 3 chains on one of 4 subjects.
    assert (check["num_chains"], check["num_steps"]) == (12, 12 * 34)
    assert check["num_draws"] * sample["num_chains"] == sample["num_draws"] * check["num_chains"]
    assert stages["solve"]["what"] == "280 weights"  # 40 sequences of 7 predicted tokens
    # One arm goes on under the same weights to its end: its walk and that of equal ones, in 1 and 3 segments.
    assert stages["predict"]["what"] == "2 walks of 248 gradients and 48 curvature products"
    # Two seeds in two rounds; between these the chains of one of the subjects, for each.
    assert stages["retrain"]["what"].startswith("5 trainings of 4 steps, in 7 rounds")
    assert stages["retrain"]["what"].endswith("6 chains between the rounds")
    assert stages["retrain"]["details"]["num_steps"] == 5 * 4
    # The bank: everything and 5 subsets with 2 seeds, and two queries of either held-out set.
    assert stages["validate"]["what"].startswith("12 trainings on subsets and all, 0 without what scores single out")
    assert stages["validate"]["what"].endswith("scores of 40 samples for 4 queries")
    assert not (tmp_path / "run").exists()


@pytest.mark.extended
def test_a_language_model_to_be_trained_here_is_stood_in_for_by_fresh_weights(local_ray: None, tmp_path: Path) -> None:
    file = make_study(tmp_path)
    architecture = (
        "{model_type: gpt_neox, hidden_size: 8, num_hidden_layers: 2, num_attention_heads: 2, "
        "intermediate_size: 16, vocab_size: 24}"
    )
    overrides = (
        f"model={{kind: huggingface, architecture: {architecture}}}",
        "training={num_steps: 6, batch_size: 4, optimizer: adamw, evaluation_sequences: 4, evaluate_every: 3}",
    )
    options = [argument for override in overrides for argument in ("--set", override)]
    found = plan(str(file), "--run-dir", str(tmp_path / "run"), *options)
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["start", "train", "sample", "report"]
    assert stages["train"]["what"] == "6 steps, 0 of annealing"
    assert stages["sample"]["details"]["num_chains"] == 2 * 3


def test_what_a_run_would_refuse_is_refused(experiment: Path, tmp_path: Path) -> None:
    arguments = ["plan", str(experiment), "--run-dir", str(tmp_path / "run"), "--set", "device=cuda"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "device: cuda was asked for" in result.stderr
    assert not (tmp_path / "run").exists()
