"""Every kind of task trains through one worker: on one rank as on two that share its parameters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import points_task
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import SETTINGS, copy_run, quiet

from patterning_dist.config import load_config
from patterning_dist.data.weights import write_sample_weights
from patterning_dist.models.huggingface import load_language_model
from patterning_dist.runtime.training.jobs import run_jobs
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.storage.run import RunDirectory
from patterning_dist.tasks.held_out import held_out_ids, held_out_splits
from patterning_dist.tasks.open import open_task
from patterning_dist.training.job import TrainingJob

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow]

ZERO_3 = Path(__file__).parents[2] / "configs" / "deepspeed" / "zero3.json"
TRAINING = {
    "batch_size": 8, "anneal_batch_size": 8, "optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1,
    "evaluation_sequences": 8,
}  # fmt: skip
GPT_NEOX = {
    "model_type": "gpt_neox", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
MODULE = {
    "model": {
        "kind": "module",
        **{key: f"points_task:{key}" for key in ("initialise", "per_sample_loss", "evaluate")},
    },
    "data": {"kind": "function", "load": "points_task:load"},
}


def write_experiment(path, **sections):
    path.write_text(yaml.safe_dump(SETTINGS | {"training": TRAINING | {"num_steps": 4}} | sections))
    return load_config(path)


def splits(config):
    return tuple((o.name, o.split) for o in config.sampling.observables if o.kind == "split_loss")


def train(config, run, prefix, **layout):
    """A fresh training with an annealing, then one on weighted data from where it ended; the folders of both."""
    common = {"inputs": [], "seed": 4, "splits": splits(config), "evaluate_every": 3, **layout}
    first = TrainingJob(name="first", folder=run.path / f"{prefix}-first", num_steps=4, anneal_steps=2, **common)
    second = TrainingJob(
        name="second", folder=run.path / f"{prefix}-second", num_steps=5, start=f"{prefix}-first",
        weights=run.path / "weights.parquet", **common,
    )  # fmt: skip
    run_jobs(config, run, [first, second], "training", quiet(), 1)
    return first.folder, second.folder


def assert_alike(one, other):
    """Weights, rows of metrics and reports of two trainings agree to the rounding of sums."""
    for name in ("initial", "model"):
        weights, expected = (load_file(folder / f"{name}.safetensors") for folder in (other, one))
        assert weights.keys() == expected.keys()
        for key, value in expected.items():
            found = weights[key]
            if key.endswith("query_key_value.bias"):
                # Nothing depends on the keys' bias, which adds the same to all scores of a query: its gradient is
                # rounding, and Adam makes steps of the usual length of it.
                found, value = (bias.view(2, 3, -1)[:, [0, 2]] for bias in (found, value))  # [head, q k v, dimension]
            torch.testing.assert_close(found, value, rtol=1e-4, atol=2e-5, msg=f"{name} {key}")
    rows, expected = (pq.read_table(folder / "metrics.parquet").to_pydict() for folder in (other, one))
    reports = [json.loads((folder / "evaluation.json").read_text()) for folder in (other, one)]
    assert rows.keys() == expected.keys()
    for name in rows.keys() - {"seconds"}:
        assert rows[name] == pytest.approx(expected[name], abs=5e-4, nan_ok=True), name
    assert reports[0].pop("observables") == pytest.approx(reports[1].pop("observables"), abs=5e-4)
    for report in reports:
        del report["seconds"], report["fingerprint"], report["sha256"]
    assert reports[0] == pytest.approx(reports[1], abs=5e-4)


@pytest.fixture(scope="module")
def gpt_neox(tiny_run, tmp_path_factory):
    """Run and configuration of a fresh GPT-NeoX on the text of the tiny run, with a weight for every second token."""
    run = copy_run(tiny_run, tmp_path_factory.mktemp("gpt_neox"))
    data = yaml.safe_load((tiny_run / "config.yaml").read_text())["data"]
    config = write_experiment(
        run.path / "config.yaml", data=data, model={"kind": "huggingface", "architecture": GPT_NEOX}
    )
    task = open_task(config, run.path, "cpu")
    sequence, position = np.meshgrid(np.arange(len(task.train)), np.arange(1, 16, 2), indexing="ij")
    weight = np.random.default_rng(0).uniform(0, 3, sequence.size)
    write_sample_weights(run.path / "weights.parquet", sequence.ravel(), position.ravel(), weight, {})
    return run, config


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """Run and configuration of the module, with a weight for every sample but one."""
    run = RunDirectory(tmp_path_factory.mktemp("points"))
    sampling = SETTINGS["sampling"] | {
        "components": [{"name": "everything"}],
        "observables": [
            {"kind": "split_loss", "name": "all", "split": "overall"},
            {"kind": "split_loss", "name": "left", "split": "domain:left"},
        ],
    }
    sections = MODULE | {"sampling": sampling, "solve": None, "response": {}, "retrain": None}
    config = write_experiment(run.path / "config.yaml", **sections)
    weight = np.random.default_rng(0).uniform(0, 3, points_task.NUM_TRAIN - 1)
    write_sample_weights(run.path / "weights.parquet", np.arange(len(weight)), None, weight, {}, key="sample_id")
    return run, config


def test_a_gpt_neox_on_two_ranks_under_zero_3_is_that_of_one(gpt_neox):
    run, config = gpt_neox
    one, two = train(config, run, "one"), train(config, run, "two", num_workers=2, deepspeed=ZERO_3)
    for a, b in zip(one, two, strict=True):
        assert_alike(a, b)
    report = json.loads((one[1] / "evaluation.json").read_text())
    num_tokens = len(open_task(config, run.path, "cpu").train) * 15
    assert report["num_missing_weights"] + report["num_joined_weights"] == num_tokens
    assert report["num_missing_weights"] == num_tokens * 7 // 15
    weights = [load_file(folder / "model.safetensors") for folder in one]
    assert max((weights[0][key] - weights[1][key]).abs().max() for key in weights[0]) > 1e-2


def test_what_a_training_of_a_language_model_leaves_is_a_checkpoint_of_transformers(gpt_neox):
    run, config = gpt_neox
    for folder in (run.path / "one-second", run.path / "two-second"):
        model, stored = load_language_model(str(folder)), load_file(folder / "model.safetensors")
        assert {key: tuple(p.shape) for key, p in model.named_parameters()} == {
            key: tuple(p.shape) for key, p in stored.items()
        }
        assert all(torch.equal(p, stored[key]) for key, p in model.named_parameters())
        # The report's observables are those of the model that was written, by another way.
        task = open_task(config, run.path, "cpu")
        ids = held_out_ids(task, config.seed, config.sampling.evaluation_sequences, "realised")
        held_out = held_out_splits(task, ids, dict(splits(config)), "realised")
        with torch.no_grad():
            losses = task.losses(model, held_out.samples[torch.arange(len(held_out.samples))]).double()
        values = (held_out.coefficients * losses).sum(dim=(1, 2))
        report = json.loads((folder / "evaluation.json").read_text())["observables"]
        assert list(report) == ["induction", "induction:induction", "induction:rest", "fables", "overall"]
        assert list(report.values()) == pytest.approx(values.tolist(), abs=1e-6)
        # And so are what the samples add to their errors, less what a sample of the mean loss would: nothing in sum.
        table = pq.read_table(folder / "held_out.parquet")
        assert table.column_names == ["group", *report] and (table["group"].to_numpy() == held_out.groups).all()
        overall = table["overall"].to_numpy()
        of_sample = (losses - values[-1]).sum(dim=1) / losses.numel()
        assert overall == pytest.approx(of_sample.numpy(), abs=1e-6)
        gap, *terms = (table[name].to_numpy() for name in list(report)[:3])
        assert gap == pytest.approx(np.nan_to_num(terms[0]) - np.nan_to_num(terms[1]), abs=1e-6)


@pytest.fixture(scope="module")
def points_on_one_rank(points):
    run, config = points
    return train(config, run, "one")


def test_a_module_on_two_ranks_under_zero_3_is_that_of_one(points, points_on_one_rank):
    run, config = points
    two = train(config, run, "two", num_workers=2, deepspeed=ZERO_3)
    for a, b in zip(points_on_one_rank, two, strict=True):
        assert_alike(a, b)
    report = json.loads((points_on_one_rank[1] / "evaluation.json").read_text())
    assert (report["num_joined_weights"], report["num_missing_weights"]) == (points_task.NUM_TRAIN - 1, 1)
    assert {"left_loss", "right_loss", "accuracy"} <= report.keys()


def test_a_module_can_be_loaded_from_what_a_training_left(points, points_on_one_rank):
    run, config = points
    model = open_task(config, run.path, "cpu").load("one-first", Ranks())
    stored = load_file(points_on_one_rank[0] / "model.safetensors")
    assert all(torch.equal(p, stored[key]) for key, p in model.named_parameters())
