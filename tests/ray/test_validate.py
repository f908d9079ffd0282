"""Attribution is measured on retrainings: what predicts them scores high, random scores score nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import window_task
import yaml
from safetensors.numpy import load_file
from tiny_run import copy_run, quiet, tiny_config

from patterning_dist.config import load_config
from patterning_dist.data.bergson import read_scores, read_subsets
from patterning_dist.driver import run_stages
from patterning_dist.errors import PatterningError
from patterning_dist.stages.validate import RESULT, validate
from patterning_dist.storage.run import RunDirectory

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow, pytest.mark.timeout(600)]

NUM_SUBSETS = 17  # and the training on everything: two stacks


def experiment(folder: Path, **validation: Any) -> Path:
    """A small classifier, trained on from its checkpoint on halves of its samples, each of which comes twice."""
    settings = {
        "name": "validate",
        "seed": 1,
        "device": "cpu",
        "data": {"kind": "function", "load": "window_task:load"},
        "model": {
            "kind": "module",
            "initialise": "window_task:initialise",
            "per_sample_loss": "window_task:per_sample_loss",
        },
        "training": {
            "num_steps": 100,
            "batch_size": 128,
            "evaluate_every": 100,
            "optimizer": "sgd",
            "learning_rate": 0.1,
        },
        "sampling": {
            "components": [{"name": "everything"}],
            "observables": [{"kind": "component_loss", "name": "component"}],
            "num_chains": 2,
            "num_draws": 200,
            "burn_in": 50,
            "inverse_temperature": 500,
            "localization": 500,
            "step_size": 1e-3,
            "batch_size": 64,
            "probe_sequences": 16,
        },
        "validation": {
            "methods": ["gradient", "influence", "susceptibility"],
            "num_queries": 10,
            "num_subsets": NUM_SUBSETS,
            "num_steps": 8,
            "engine": "stacked",
            "num_draws": 200,
            "removed_share": 0.1,
            **validation,
        },
    }
    path = folder / "validate.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that is done, in ``run``."""
    folder = tmp_path_factory.mktemp("validate")
    run_stages(load_config(experiment(folder)), None, folder / "run")
    return folder


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / RESULT).read_text())


def test_gradients_predict_short_retrainings_and_random_scores_do_not(folder: Path) -> None:
    """To first order in the rate a retraining adds up gradients of its samples; so small a window is nearly that."""
    found = result(folder / "run")
    assert found["num_removed"] == [256, 256] and found["num_queries"] == 20 and found["passes"] == 2
    for method in ("gradient", "influence"):
        assert found["methods"][method]["lds"]["value"] > 0.9
        assert found["methods"][method]["lds"]["interval"][0] > 0.8
        # Without a tenth of the samples, the best for each query; a random tenth does next to nothing.
        assert found["methods"][method]["qld"]["over_random"]["interval"][0] > 0
    assert found["methods"]["susceptibility"]["lds"]["interval"][0] > 0
    low, high = found["methods"]["random"]["lds"]["interval"]
    assert low < 0 < high
    assert found["ceiling"] is None  # of one seed
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["validation"]["methods"]["gradient"] == found["methods"]["gradient"]
    assert "gradient, influence and susceptibility predict retrainings" in (folder / "run/report.html").read_text()


def test_subsets_are_those_of_the_bank(folder: Path) -> None:
    bank = folder / "run" / "validate" / "bank" / "seed-0"
    removed = read_subsets(bank, window_task.NUM_TRAIN)
    assert len(removed) == NUM_SUBSETS and all(len(np.unique(ids)) == 256 for ids in removed)
    assert len({tuple(ids) for ids in removed}) == NUM_SUBSETS
    models = [load_file(bank / "retrained" / f"{name}/model.safetensors") for name in ("base", "subset_0", "subset_16")]
    assert len({model["0.weight"].tobytes() for model in models}) == 3


def test_what_is_done_is_kept_and_what_is_missing_comes_out_the_same(folder: Path) -> None:
    run, before = folder / "run", result(folder / "run")
    reports = sorted(run.glob("validate/bank/seed-0/retrained/*/evaluation.json"))
    times = {file: file.stat().st_mtime_ns for file in reports}
    lost = run / "validate" / "bank" / "seed-0" / "retrained" / "subset_16"
    (lost / "evaluation.json").unlink()
    (run / "validate" / "passes" / "gradient-3.npz").unlink()
    (run / RESULT).unlink()
    run_stages(load_config(experiment(folder)), None, run)
    assert result(run) == before
    trained = {file.parent.name for file in reports if file.stat().st_mtime_ns != times[file]}
    assert trained == {"subset_15", "subset_16"}  # of its stack, the others are the first sixteen


def test_scores_and_a_bank_can_come_from_elsewhere(folder: Path) -> None:
    given = {"again": str(folder / "run" / "validate" / "gradient" / "scores")}
    bank = str(folder / "run" / "validate" / "bank" / "seed-0")
    other = folder / "other"
    other.mkdir()
    changes = {"methods": ["gradient"], "scores": given, "bank": bank, "num_steps": None, "removed_share": None}
    run = RunDirectory(other / "run")
    (other / "run" / "baseline").symlink_to(folder / "run" / "baseline")
    with run.locked():
        validate(load_config(experiment(other, **changes)), run, quiet())
    found, before = result(other / "run"), result(folder / "run")
    for name in ("gradient", "again"):
        assert found["methods"][name]["lds"] == before["methods"]["gradient"]["lds"]
    with run.locked(), pytest.raises(PatterningError, match=r"scores of 512 samples for 20 queries.*10 queries"):
        validate(load_config(experiment(other, **changes, num_queries=5)), run, quiet())
    with run.locked(), pytest.raises(PatterningError, match=r"removed_token_share: a sample has one loss"):
        validate(load_config(experiment(other, removed_token_share=0.1)), run, quiet())


def test_single_losses_of_tokens_and_two_seeds(tiny_run: Path, tmp_path: Path) -> None:
    """A language model: scores of tokens add up to those of samples, and removing the best tokens hurts."""
    run = copy_run(tiny_run, tmp_path)
    validation = {
        "methods": ["gradient", "bm25"],
        "num_queries": 4,
        "num_subsets": 4,
        "num_steps": 48,
        "seeds": [0, 1],
        "engine": "stacked",
        "removed_token_share": 0.05,
    }
    settings = yaml.safe_load((run.path / "config.yaml").read_text()) | {"validation": validation}
    (run.path / "config.yaml").write_text(yaml.safe_dump(settings))
    with run.locked() as locked:
        validate(tiny_config(run.path), locked, quiet())
    found = result(run.path)
    assert found["seeds"] == [0, 1] and found["agreement"]["value"] is not None
    scores, offsets = read_scores(run.path / "validate" / "bm25" / "scores")
    assert offsets is not None and (np.diff(offsets) == 15).all() and (scores <= 0).all()
    for method in ("gradient", "bm25"):
        assert found["methods"][method]["token_qld"]["over_random"]["interval"][0] > 0
        assert "qld" not in found["methods"][method]
