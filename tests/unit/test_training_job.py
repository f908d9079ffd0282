"""A job's fingerprint follows from what it computes, not from where its files lie."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
from tiny_run import tiny_config

from patterning_dist.config.training import WindowConfig
from patterning_dist.experiments import loop
from patterning_dist.experiments.loop import Loop
from patterning_dist.training import job as training_job
from patterning_dist.training.job import TrainingJob


@pytest.fixture
def job(tmp_path):
    for name in ("one", "same", "other"):
        (tmp_path / name).write_text("other" if name == "other" else "one")
    return TrainingJob(
        name="plus seed 1", folder=tmp_path / "run" / "retrain", inputs=["data", "start"], seed=1, num_steps=5,
        start="baseline", weights=tmp_path / "one", deepspeed=tmp_path / "one",
    )  # fmt: skip


def test_every_field_counts_but_places_and_the_time_between_checkpoints(job, tiny_run):
    config = tiny_config(tiny_run)
    changed = {
        "name": "minus", "inputs": ["data", "another start"], "seed": 2, "num_steps": 6, "anneal_steps": 1,
        "rate_factor": 0.5,
        "evaluate_every": 7, "start": None, "weights": job.weights.with_name("other"), "strength": 2.0,
        "weighting": "draw", "weighted_share": 0.5, "splits": (("all", "overall"),),
        "deepspeed": job.weights.with_name("other"), "stack": "plus",
        "window": WindowConfig(optimizer="sgd", learning_rate=0.1, num_steps=5),
    }  # fmt: skip
    same = {
        "folder": Path("elsewhere"), "checkpoint_seconds": 1.0, "weights": job.weights.with_name("same"),
        "deepspeed": job.weights.with_name("same"), "num_workers": 2,
    }  # fmt: skip
    assert changed.keys() | same.keys() == {field.name for field in fields(job)}
    prints = [replace(job, **{key: value}).fingerprint(config) for key, value in changed.items()]
    assert len({job.fingerprint(config), *prints}) == 1 + len(changed)
    assert {replace(job, **{key: value}).fingerprint(config) for key, value in same.items()} == {
        job.fingerprint(config)
    }


def test_arms_that_an_earlier_rule_weighed_are_trained_again(job, tiny_run, monkeypatch):
    """And no others are: without weights, or drawn by them, every rule is the same."""
    config = tiny_config(tiny_run)
    others = [replace(job, weights=None), replace(job, weighting="draw")]
    before = job.fingerprint(config), *(other.fingerprint(config) for other in others)
    inputs = Loop().inputs(config, {})
    monkeypatch.setattr(training_job, "WEIGHTED_LOSS", "sum of rho l over sum of rho, of the batch")
    after = job.fingerprint(config), *(other.fingerprint(config) for other in others)
    assert after[0] != before[0] and after[1:] == before[1:]
    monkeypatch.setattr(loop, "WEIGHTED_LOSS", training_job.WEIGHTED_LOSS)
    changed = Loop().inputs(config, {})
    assert changed["retrain"] != inputs["retrain"] and changed["data"] == inputs["data"]


def test_the_configuration_counts_as_far_as_it_bears_on_a_training(job, tiny_run):
    def fingerprint(job, *overrides):
        return job.fingerprint(tiny_config(tiny_run, *overrides))

    for override in ("model.d_head=8", "training.learning_rate=0.5", "seed=4"):
        assert fingerprint(job, override) != fingerprint(job), override
    # Held-out samples bear on the observables of a job that has some.
    measured = replace(job, splits=(("all", "overall"),))
    for override, bears in (("sampling.step_size=2e-4", False), ("sampling.evaluation_sequences=3", True)):
        assert fingerprint(job, override) == fingerprint(job)
        assert (fingerprint(measured, override) != fingerprint(measured)) == bears


def test_what_a_node_must_have_of_the_run_directory(job, tmp_path):
    assert job.needs(tmp_path / "run") == ["data", "retrain", "baseline/model.safetensors", "baseline/config.json"]
    inside = replace(job, weights=tmp_path / "run" / "weights" / "plus.parquet", start=None)
    assert inside.needs(tmp_path / "run") == ["data", "weights/plus.parquet", "retrain"]
