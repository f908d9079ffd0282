"""Scores of a pool in files: stage solve finds the weights of the same scores in memory, whatever the files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_run import InProcess, copy_run, quiet, tiny_config

from patterning_dist.errors import PatterningError
from patterning_dist.runtime import pool as runtime_pool
from patterning_dist.runtime.pool import store_columns
from patterning_dist.stages import solve as stage
from patterning_dist.stages.scores import Scores, centred

TARGETS = "solve={component: everything, targets: {induction: -1, fables: 0}, effective_sample_share: 0.8}"


def parts_of(scores: np.ndarray, length: int) -> list[np.ndarray]:
    return [scores[:, start : start + length] for start in range(0, scores.shape[1], length)]


@pytest.mark.parametrize("numbers", [1, 100, 1 << 22])
def test_files_hold_the_scores_less_their_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    monkeypatch.setattr(runtime_pool, "_STORED", numbers)
    scores = np.random.default_rng(0).normal(3, 1, (2, 1000)).astype(np.float32)
    folder = tmp_path / "scores"
    store_columns(parts_of(scores, 10), folder)  # more files than the next has: those must not stay
    shards = store_columns(iter(parts_of(scores, 77)), folder)
    assert len(shards) == len(list(folder.iterdir())) == {1: 13, 100: 13, 1 << 22: 1}[numbers]
    found = np.concatenate([shard[:, :] for shard in shards], axis=1)
    assert found.dtype == np.float32
    # The mean of a row is summed part by part: its last bit may turn the rounding to float32, and no more.
    np.testing.assert_allclose(found, centred(scores), rtol=0, atol=np.spacing(np.float32(4)))


@pytest.mark.parametrize("level", ["token", "document"])
def test_weights_do_not_depend_on_the_files(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    monkeypatch.setattr(stage, "Pool", InProcess)
    found = {}
    for numbers in (None, 200, 1 << 22):

        def scores_of(pool, observables, progress, numbers=numbers):
            rng = np.random.default_rng(1)
            chi = rng.standard_t(4, size=(2, len(pool.in_subset))).astype(np.float32)
            chains = centred(chi[None, :, pool.in_subset] + rng.normal(size=(4, 2, pool.in_subset.sum())))
            shards = [centred(chi)]
            if numbers is not None:
                monkeypatch.setattr(runtime_pool, "_STORED", numbers)
                shards = store_columns(parts_of(chi, 60), pool.scratch / "scores")
            return Scores(shards, pool.in_subset, chains, observables, {"estimator": "made up"})

        monkeypatch.setitem(stage._SCORES, "response_direction", scores_of)
        (tmp_path / str(numbers)).mkdir()
        run = copy_run(tiny_run, tmp_path / str(numbers))
        run.update_manifest(stages={})
        stage.solve(tiny_config(run.path, TARGETS, f"solve.level={level}"), run, quiet())
        assert not list(run.path.glob("scores/*/scratch"))
        tables = [run.path / "response" / "pool.parquet"]
        tables += [run.path / "weights" / f"{arm}.parquet" for arm in ("plus", "minus", "permuted")]
        report = json.loads((run.path / "weights" / "solution.json").read_text())
        found[numbers] = [pq.read_table(table) for table in tables], report["arms"]["plus"]
    (whole, of_whole), *others = found.values()
    for tables, of_arm in others:
        assert of_arm["strength"] == pytest.approx(of_whole["strength"], rel=1e-6)  # scores are float32
        assert of_arm["effective_sample_share"] == pytest.approx(0.8, rel=1e-9)
        for expected, table in zip(whole, tables, strict=True):
            assert table.schema.equals(expected.schema, check_metadata=True)
            for name in expected.column_names:
                one, other = (t[name].to_numpy(zero_copy_only=False) for t in (expected, table))
                np.testing.assert_allclose(other, one, rtol=0, atol=2e-5, err_msg=name)


def test_scores_are_gone_after_an_error_too(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "Pool", InProcess)

    def scores_of(pool, observables, progress):
        chi = np.random.default_rng(1).normal(size=(2, len(pool.in_subset))).astype(np.float32)
        shards = store_columns([chi], pool.scratch / "scores")
        chains = np.repeat(centred(chi[None, :, pool.in_subset]), 2, axis=0)
        return Scores(shards, pool.in_subset, chains, observables, {"estimator": "made up"})

    monkeypatch.setitem(stage._SCORES, "response_direction", scores_of)
    run = copy_run(tiny_run, tmp_path)
    with pytest.raises(
        PatterningError, match=r"effective sample share: 0.01 is below 0\.\d+, the smallest with weights"
    ):
        stage.solve(tiny_config(run.path, TARGETS, "solve.effective_sample_share=0.01"), run, quiet())
    assert not list(run.path.glob("scores/*/scratch"))
