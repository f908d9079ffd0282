"""`patterning plan --gpus`: an answer from config.json alone, the same counts as by a probe, and times that hold."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from big_models import write_llama_1b_reward, write_pythia_160m
from study_models import make_study
from typer.testing import CliRunner

from patterning_dist.cli import app
from patterning_dist.config import load_config
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.stages.plan import machine as machine_module
from patterning_dist.stages.plan.costs import Costs
from patterning_dist.stages.plan.machine import Machine, measure_flops
from patterning_dist.stages.sample import open_subjects
from patterning_dist.storage.mirror import Location

CONFIGS = Path(__file__).parents[2] / "configs"


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


def plan(*arguments: str) -> dict[str, Any]:
    found = invoke("plan", *arguments, "--json")
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def sets(overrides: list[str]) -> list[str]:
    return [argument for override in overrides for argument in ("--set", override)]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """With config.json alone: neither weights nor data."""
    file = make_study(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    for table in tmp_path.glob("*.parquet"):
        table.unlink()
    return file


LOOP = [
    "response.direction={component: layer.1.mlp, hessian_sequences: 8}",
    "solve={component: layer.1.mlp, checkpoint: final, targets: {up: -0.01}, effective_sample_share: 0.7}",
    "check.strengths=[-0.3, 0.5, 1]",
    "training={batch_size: 8, optimizer: adamw, evaluation_sequences: 4}",
    "retrain={seeds: [0, 1], num_steps: 4, evaluate_every: 2, start: final, arms: [base, plus]}",
    "validation={start: final, component: layer.1.mlp, methods: [gradient, susceptibility], num_queries: 3, "
    "num_subsets: 5, num_steps: 6, seeds: [0, 1], removed_share: 0.1}",
]


def test_the_whole_loop_from_config_json_alone(study: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    found = plan(study, "--run-dir", directory, "--gpus", "4", "--gpu-memory", "10", "--flops", "1e12", *sets(LOOP))
    assert not directory.exists()
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["sample", "solve", "check", "retrain", "validate", "report"]
    for stage in stages.values():
        assert 0 < stage["seconds"]["low"] <= stage["seconds"]["value"] <= stage["seconds"]["high"], stage["name"]
    # 2 checkpoints of 2 components, 3 chains of 16 draws each; 4 + 15 * 2 steps: as a probe counts them.
    details = stages["sample"]["details"]
    assert (details["num_chains"], details["num_draws"], details["num_steps"]) == (12, 192, 12 * 34)
    assert stages["check"]["details"]["num_chains"] == 12
    assert stages["retrain"]["details"]["num_steps"] == 4 * 4
    # Everything and 5 subsets with 2 seeds; 3 methods with random scores, 3 queries in each of 2 sets, 2 seeds.
    assert stages["validate"]["details"]["num_trainings"] == 6 * 2 + 3 * 6 * 2
    assert found["device"] == "cuda" and found["total"]["gpu_hours"] > 0
    assumed = found["analysis"]["assumptions"]
    assert sum("is not there: 10,000 samples of 8 tokens instead" in line for line in assumed) == 1
    assert any("1e+12 FLOP/s a GPU, given" in line for line in assumed)
    wanted = found["analysis"]["wanted"]
    assert (wanted["num_draws"], wanted["num_subjects"]) == (pytest.approx(10_100), 4) and wanted["gpu_hours"] > 0
    assert [layout["section"] for layout in found["analysis"]["layouts"]] == ["sampling", "retrain", "validation"]


def test_a_layout_that_does_not_fit_is_replaced(study: Path, tmp_path: Path) -> None:
    # A tiny chain fits anywhere; a DeepSpeed bucket of 2 GB does not fit 4 GB less the reserve, plain training does.
    zero = tmp_path / "zero3.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    overrides = [LOOP[3], LOOP[4].replace(", plus", ""), f"retrain.deepspeed={zero}", "retrain.num_workers=2"]
    found = plan(
        study, "--run-dir", tmp_path / "r", "--gpus", "4", "--gpu-memory", "4", "--flops", "1e12", *sets(overrides)
    )
    sampling, retrain = found["analysis"]["layouts"]
    assert sampling["set"] == [] and retrain["set"] == ["retrain.deepspeed=configs/deepspeed/zero0.json"]
    assert [(tried["num_ranks"], tried["zero_stage"]) for tried in retrain["tried"]] == [(2, 3), (2, 0)]
    assert {stage["name"]: stage for stage in found["stages"]}["retrain"]["processes"] == 4  # two trainings at once


def test_what_does_not_fit_has_no_times_and_the_rest_has(study: Path, tmp_path: Path) -> None:
    overrides = [LOOP[3].replace("batch_size: 8", "batch_size: 64"), LOOP[4].replace(", plus", "")]
    overrides.append("sampling.cache_gib=0")
    # Less the reserve 60 kB: enough for passes of 4 samples, and not of 64.
    tiny = ["--gpus", "1", "--gpu-memory", "1.6305", "--flops", "1e12"]
    found = plan(study, "--run-dir", tmp_path / "run", *tiny, *sets(overrides))
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert [layout["chosen"] for layout in found["analysis"]["layouts"]] == [0, None]
    assert stages["retrain"]["what"] == "does not fit" and stages["retrain"]["seconds"]["value"] == 0
    assert stages["sample"]["seconds"]["value"] > 0 and "wanted" in found["analysis"]


def test_without_a_rate_there_are_no_times(study: Path, tmp_path: Path) -> None:
    found = invoke("plan", study, "--run-dir", tmp_path / "run", "--gpus", "2", "--set", "device=cpu")
    assert found.exit_code == 0
    text = " ".join(found.stdout.split())
    assert "no times: give --flops" in text and "fits as it is" in text and "GPU-hours" not in text


def test_a_mistake_in_the_file_is_one_line(study: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(
        app, ["plan", str(study), "--gpus", "2", "--set", "sampling.components=[{name: nothing}]"]
    )
    assert found.exit_code == 2 and "component 'nothing' does not exist in this model" in found.stderr


@pytest.mark.parametrize(
    ("name", "write", "num_subjects"),
    [("pythia-160m", write_pythia_160m, 144), ("llama-1b-reward", write_llama_1b_reward, 17)],
)
def test_experiments_on_bigger_models_are_checked(name: str, write: Any, num_subjects: int, tmp_path: Path) -> None:
    overrides = write(tmp_path)
    found = invoke("config", "check", CONFIGS / f"{name}.yaml", *sets(overrides))
    assert found.exit_code == 0 and "ok; the run is kept in" in found.stdout, found.output
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    opener = open_subjects(config, Location.at(tmp_path / "run"), "cpu")
    assert len(opener("cpu", Ranks()).by_name) == num_subjects


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "write", "nodes"),
    [("pythia-160m", write_pythia_160m, "1"), ("llama-1b-reward", write_llama_1b_reward, "4")],
)
def test_experiments_on_bigger_models_are_planned(name: str, write: Any, nodes: str, tmp_path: Path) -> None:
    model, *_ = write(tmp_path)
    file = CONFIGS / f"{name}.yaml"
    found = plan(
        file, "--run-dir", tmp_path / "run", "--gpus", "8", "--nodes", nodes, "--flops", "5e13", "--set", model
    )
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert stages["sample"]["processes"] == 8 * int(nodes) and stages["sample"]["details"]["weight_bytes"] > 6e8
    assert all(layout["chosen"] is not None for layout in found["analysis"]["layouts"])


def test_a_rate_that_was_measured_foretells_the_time_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, in CPU time, so that others on the machine do not count."""
    monkeypatch.setattr(machine_module.time, "perf_counter", time.process_time)
    file = make_study(tmp_path)
    shutil.rmtree(tmp_path / "model")
    architecture = "{model_type: gpt_neox, hidden_size: 128, num_hidden_layers: 4, num_attention_heads: 4, "
    architecture += "intermediate_size: 512, vocab_size: 2000}"
    overrides = [
        f"model={{kind: huggingface, architecture: {architecture}}}",
        "training={num_steps: 6, batch_size: 4, optimizer: adamw, evaluation_sequences: 4}",
        "sampling.components=[{name: everything}]",
        "sampling.observables=[{kind: split_loss, name: all, split: overall}]",
        "sampling.batch_size=16",
        "sampling.micro_batch_size=16",
        "data.context_length=8",
    ]
    config = load_config(file, overrides)
    opener = open_subjects(config, Location.at(tmp_path / "run"), "cpu")
    subjects = opener("cpu", Ranks())
    rate = measure_flops(subjects.task, 16, "cpu")
    costs = Costs(config, subjects, Machine(1, 1, 80e9, rate, measured=True))
    planned = costs.machine.passes(costs.gradient("everything", 1))
    subjects.model = lambda checkpoint: subjects.task.build(0)  # type: ignore[method-assign]
    chain = subjects.chain("everything", 0, burn_in=0, num_draws=1, steps_between_draws=1)
    times = []
    for _ in range(5):
        started = time.process_time()
        chain.target.gradient(np.arange(16))
        times.append(time.process_time() - started)
    # Fewer layers than the model has were timed, and small products are slower than large ones.
    assert 0.5 < planned / min(times) < 2
