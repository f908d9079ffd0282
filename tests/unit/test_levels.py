"""One weight for all losses of a sequence, a document or a pair: chi of it is the sum over its losses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_run import InProcess, copy_run, quiet, tiny_config

from patterning_dist.data.weights import SampleWeights
from patterning_dist.errors import PatterningError
from patterning_dist.response.solver import solve_weights
from patterning_dist.stages import solve as stage
from patterning_dist.stages.levels import Units
from patterning_dist.tasks.open import open_task

OF = np.array([0, 0, 2, 1, 1, 1, 2, 2, 2])
UNITS = Units("document", OF, np.array([10, 20, 30]), np.array([2, 3, 4]))


def test_sums_and_means_of_units() -> None:
    chi = np.random.default_rng(0).normal(size=(2, 3, 9))
    sums = np.stack([chi[..., unit == OF].sum(axis=-1) for unit in range(3)], axis=-1)
    np.testing.assert_allclose(UNITS.sums(chi), sums)
    np.testing.assert_allclose(UNITS.means(chi), (sums / [2, 3, 4])[..., OF])
    part = np.array([0, 1, 1, 0, 0, 0, 1, 0, 0], bool)  # of the second unit nothing is there
    np.testing.assert_allclose(UNITS.means(chi[..., part], part)[..., 0], chi[..., 1])
    np.testing.assert_allclose(UNITS.means(chi[..., part], part)[..., 1], chi[..., [2, 6]].mean(axis=-1))


def test_whole_units_are_dealt() -> None:
    weights = np.array([0.5, 2.0, 1.5])[OF]
    found = UNITS.dealt(weights, None, seed=4)
    assert sorted({(unit, w) for unit, w in zip(OF, found, strict=True)})[0][0] == 0
    assert len({(unit, w) for unit, w in zip(OF, found, strict=True)}) == 3
    assert sorted(set(found)) == [0.5, 1.5, 2.0]
    kept = UNITS.dealt(weights, np.array([0, 1, 0])[OF], seed=4)
    assert kept[3] == 2.0
    assert {kept[0], kept[2]} == {0.5, 1.5}


def test_the_solution_is_the_least_change_of_units_that_moves_the_observable() -> None:
    """min sum_g n_g h_g^2 with (n_beta / n) sum_g chi_g h_g = t, chi_g the sum over unit g: h_g ~ chi_g / n_g."""
    chi = np.random.default_rng(1).normal(size=9)
    chi -= chi.mean()
    options = {"inverse_temperature": 4.5, "weight_min": 0.0, "weight_max": 50.0, "observables": ["o"]}
    found = solve_weights(UNITS.means(chi[None]), [0.01], strength=1.0, **options)
    sums, sizes = UNITS.sums(chi), UNITS.sizes
    change = sums / sizes
    change *= 0.01 / (4.5 / 9 * (sums @ change))
    np.testing.assert_allclose(found.weights, 1 + change[OF], rtol=1e-6)
    assert 4.5 / 9 * (chi @ (found.weights - 1)) == pytest.approx(0.01)


SOLVE = (
    "sampling.observables=[{kind: component_loss, name: component}, {kind: free_energy, name: energy}]",
    "solve={scores: first_moment, component: everything, targets: {energy: -1}, effective_sample_share: 0.8, "
    "num_draws: 2, min_reliability: -1, controls: [{kind: ablation, name: removed}, {kind: permuted, name: dealt, "
    "within: domain}]}",
)


@pytest.fixture
def solved(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stage solve at a level, in this process: pool table, weights by arm [sequence, position], solution.json, task."""
    monkeypatch.setattr(stage, "Pool", InProcess)

    def run_at(level: str):
        (tmp_path / level).mkdir()
        run = copy_run(tiny_run, tmp_path / level)
        config = tiny_config(run.path, *SOLVE, f"solve.level={level}")
        run.update_manifest(stages={})
        stage.solve(config, run, quiet())
        task = open_task(config, run.path, "cpu")
        tables = {arm: run.path / "weights" / f"{arm}.parquet" for arm in ("plus", "permuted", "removed", "dealt")}
        weights = {
            arm: SampleWeights.load(path).join(len(task.train), task.num_positions).weights
            for arm, path in tables.items()
        }
        pool = pq.read_table(run.path / "response" / "pool.parquet")
        return pool, weights, json.loads((run.path / "weights" / "solution.json").read_text()), task

    return run_at


@pytest.mark.parametrize("level", ["sequence", "document"])
def test_stage_solve_weighs_whole_units(solved, level: str) -> None:
    fine, by_token, _, task = solved("token")
    coarse, weights, solution, _ = solved(level)
    samples = np.arange(len(task.train))
    unit = samples if level == "sequence" else task.train.documents
    values, of = np.unique(unit, return_inverse=True)
    assert coarse["sequence_id" if level == "sequence" else "document"].to_pylist() == values.tolist()
    sums = np.bincount(of[fine["sequence_id"].to_numpy()], fine["chi_energy"].to_numpy())
    np.testing.assert_allclose(coarse["chi_energy"].to_numpy(), sums, rtol=0, atol=1e-4 * np.abs(sums).max())
    assert sum(coarse["num_losses"].to_pylist()) == fine.num_rows
    assert solution["level"] == level
    assert np.ptp(by_token["plus"], axis=1).max() > 0
    for arm, found in weights.items():
        assert np.ptp(found, axis=1).max() == 0, arm
        for number in range(len(values)):
            assert np.ptp(found[of == number]) == 0, arm
        share = found.astype(float).sum() ** 2 / (found.size * np.square(found, dtype=float).sum())
        assert solution["arms"][arm]["effective_sample_share"] == pytest.approx(share, rel=1e-5)
    assert solution["arms"]["plus"]["effective_sample_share"] == pytest.approx(0.8, abs=1e-3)
    first = np.unique(of, return_index=True)[1]
    for arm in ("permuted", "dealt"):
        assert not np.array_equal(weights[arm], weights["plus"])
        np.testing.assert_array_equal(np.sort(weights[arm][first, 0]), np.sort(weights["plus"][first, 0]))
    domains = task.train.domains[first]
    for domain in set(domains):
        here = first[domains == domain]
        np.testing.assert_array_equal(np.sort(weights["dealt"][here, 0]), np.sort(weights["plus"][here, 0]))


def test_the_error_of_a_sum_is_its_spread_over_replicates(solved) -> None:
    fine, _, _, task = solved("token")
    coarse, _, _, _ = solved("sequence")
    known = ~np.isnan(coarse["se_energy"].to_numpy(zero_copy_only=False))
    assert known.any()
    num = fine.num_rows // len(task.train)
    # Tokens of a sequence move together or apart: the error of their sum is at most the sum of their errors.
    most = fine["se_energy"].to_numpy(zero_copy_only=False).reshape(-1, num).sum(axis=1)
    assert (coarse["se_energy"].to_numpy(zero_copy_only=False)[known] <= most[known] * 1.001).all()
    assert not np.allclose(coarse["se_energy"].to_numpy(zero_copy_only=False)[known], most[known])


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (("solve.level=pair",), "solve.level: samples here have no 'pair'; expected one of token, sequence, document"),
        (("solve.level=word",), "solve.level: expected 'token', 'sequence', 'document' or 'pair', got 'word'"),
        (
            ("solve.level=sequence", "solve.keep_mass=token"),
            "solve.keep_mass: a sequence has one weight, so that no tok",
        ),
        (
            ("solve.level=document", "solve.controls=[{kind: permuted, name: c, within: token}]"),
            "solve.controls: c is within each token, and a document has one weight; remove it",
        ),
    ],
)
def test_levels_that_make_no_sense_are_refused_with_the_file(tiny_run: Path, overrides: tuple, text: str) -> None:
    with pytest.raises(PatterningError) as refused:
        tiny_config(tiny_run, *SOLVE, *overrides)
    assert text in str(refused.value)


def test_groups_that_cut_through_units_are_refused() -> None:
    UNITS.check_whole(np.array([5, 7, 5])[OF], "solve.keep_mass")
    with pytest.raises(PatterningError, match=r"solve\.keep_mass: a document has one weight, and some are of"):
        UNITS.check_whole(np.arange(9), "solve.keep_mass")
