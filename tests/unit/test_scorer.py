"""Weights of samples that a run has not seen, from a scorer whose r is of samples that it was not fitted to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_model
from sklearn.linear_model import Ridge as Theirs
from test_export import run_of
from typer.testing import CliRunner

from patterning_dist.cli import app
from patterning_dist.data.weights import write_sample_weights
from patterning_dist.response.ridge import (
    Products,
    choose_ridge,
    fit_ridge,
    grouped_correlation,
    mean_squared_error,
)
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.tasks.open import open_task

RNG = np.random.default_rng(3)


def products(features: np.ndarray, target: np.ndarray) -> Products:
    found = Products.empty(features.shape[1])
    for part in np.array_split(np.arange(len(target)), 3):  # in pieces, as they come
        found.update(features[part], target[part])
    return found


def sample(number: int) -> tuple[np.ndarray, np.ndarray]:
    features = RNG.normal(size=(number, 4)) * [1, 10, 0.1, 0] + [0, 5, -3, 2]
    return features, features @ [1, 0.2, -4, 0] + 7 + RNG.normal(size=number)


@pytest.mark.parametrize("penalty", [1e-6, 0.3])
def test_the_ridge_is_that_of_scikit_learn(penalty: float) -> None:
    features, target = sample(300)
    ours = fit_ridge(products(features, target), penalty)
    scale = features.std(axis=0)
    scale[3] = 1  # constant
    theirs = Theirs(alpha=penalty * len(target)).fit(features / scale, target)
    np.testing.assert_allclose(ours.predict(features), theirs.predict(features / scale), rtol=1e-9)
    error = np.mean((target - theirs.predict(features / scale)) ** 2)
    assert mean_squared_error(products(features, target), ours) == pytest.approx(error, rel=1e-9)


def test_the_penalty_is_the_one_with_the_least_error_elsewhere() -> None:
    (a, b), (c, d) = sample(12), sample(400)
    noise = RNG.normal(size=(412, 30))
    first, second = products(np.hstack([a, noise[:12]]), b), products(np.hstack([c, noise[12:]]), d)
    penalties = np.logspace(-6, 2, 9)
    errors = [mean_squared_error(second, fit_ridge(first, penalty)) for penalty in penalties]
    assert choose_ridge(first, second, penalties).penalty == penalties[np.argmin(errors)] > 1e-6


def test_the_interval_of_r_knows_that_rows_of_a_group_belong_together() -> None:
    group = np.repeat(np.arange(30), 40)
    shared = RNG.normal(size=(2, 30))
    x, y = (np.repeat(part, 40) + 0.1 * RNG.normal(size=1200) for part in shared)
    r, (low, high) = grouped_correlation(x, y, group)
    assert r == pytest.approx(np.corrcoef(x, y)[0, 1])
    alone = grouped_correlation(x, y, np.arange(1200))[1]
    assert high - low > 3 * (alone[1] - alone[0])  # there are 30 pairs


def planted(kind: str, folder: Path, knows: bool = True) -> Path:
    """A run with a checkpoint, and weights that follow from the loss there, or from nothing."""
    config, run = run_of(kind, folder)
    task = open_task(config, run, "cpu")
    checkpoint = config.checkpoints[0]
    if not config.model.given_checkpoints:
        model = task.build(1)
        (run / checkpoint).mkdir()
        save_model(model, run / checkpoint / "model.safetensors")
        task.describe(run / checkpoint)
    else:
        model = task.load(checkpoint, Ranks())
    number, length = len(task.train), task.num_positions
    with torch.no_grad():
        losses = task.losses(model.eval(), task.train[torch.arange(number)]).numpy()
    rows = losses if knows else np.random.default_rng(1).permutation(losses.ravel()).reshape(losses.shape)
    weights = 1 + 0.5 * (rows - rows.mean()) / np.abs(rows - rows.mean()).max()
    ids = np.repeat(np.arange(number), length or 1)
    position = None if length is None else np.tile(np.arange(1, length + 1), number)
    write_sample_weights(run / "weights/plus.parquet", ids, position, weights.ravel(), {}, task.key)
    return run


def said(run: Path, data: Path, to: Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["score", str(run), "plus", str(data), "--to", str(to)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("kind", ["attention_only", "gpt_neox", "llama", "reward_model", "digits"])
def test_weights_that_follow_from_the_loss_are_known_elsewhere(tmp_path: Path, kind: str) -> None:
    run, out = planted(kind, tmp_path / "x"), tmp_path / "out"
    data = new_data(tmp_path / "x", kind)
    if kind == "digits":
        data.touch()
        assert "come from a function" in said(run, data, out, code=2)
        return
    assert "that it was not fitted to its r with the weights is" in said(run, data, out)
    found, table = json.loads((out / "export.json").read_text()), pq.read_table(out / "train.parquet").to_pandas()
    assert found["scorer"]["r"] > (0.8 if kind == "reward_model" else 0.99)  # 18 pairs are few to fit to
    stored = json.loads((run / "scorers/plus/scorer.json").read_text())
    assert found["effective_share"] == pytest.approx(stored["share"], abs=2e-3)
    weights = np.concatenate(table["token_weights"].tolist()) if "token_weights" in table else table["weight"]
    counted = weights[weights > 0]
    assert counted.mean() == pytest.approx(1, abs=1e-3)
    before = (run / "scorers/plus/scorer.npz").stat().st_mtime_ns
    said(run, data, tmp_path / "again")
    assert (run / "scorers/plus/scorer.npz").stat().st_mtime_ns == before, "kept, and not fitted again"


def new_data(folder: Path, kind: str) -> Path:
    """What the run was trained on, as if it were new."""
    files = {"attention_only": "corpus", "gpt_neox": "corpus"}
    name = files.get(kind, "train.parquet")
    return folder / name


def test_weights_that_follow_from_nothing_have_an_r_around_0(tmp_path: Path) -> None:
    run = planted("gpt_neox", tmp_path / "x", knows=False)
    said(run, new_data(tmp_path / "x", "gpt_neox"), tmp_path / "out")
    low, high = json.loads((tmp_path / "out/export.json").read_text())["scorer"]["interval"]
    assert low < 0.1 and high > -0.1


def test_what_is_not_there_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    run = planted("llama", tmp_path / "x")
    assert "is not there; give text files" in said(run, tmp_path / "nothing.jsonl", tmp_path / "out", code=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "give a folder that is new or empty" in said(run, tmp_path / "x/train.parquet", tmp_path / "out", code=2)
