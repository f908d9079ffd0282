"""Weights of first moments: the component is the one that matters most, and every score is what it is by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from tiny_run import copy_run, quiet, subjects_of, tiny_config

from patterning_dist.aggregation.files import read_positions
from patterning_dist.errors import PatterningError
from patterning_dist.measure.subject import Subject
from patterning_dist.measure.subjects import Subjects
from patterning_dist.response.reliability import split_half_reliability
from patterning_dist.response.solver import solve_for_effective_sample_share
from patterning_dist.runtime.training.jobs import run_jobs
from patterning_dist.sampling.first_moment import antithetic_pair, mean_rises
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samples import all_losses
from patterning_dist.sampling.statistics import flatten, unflatten
from patterning_dist.stages.sample import sample
from patterning_dist.stages.solve import solve
from patterning_dist.stages.train import retrain
from patterning_dist.storage.run import RunDirectory
from patterning_dist.training.job import TrainingJob

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow]

SOLVE = """{scores: first_moment, component: layer.1.head.*, targets: {energy: -1}, effective_sample_share: 0.8,
num_draws: 3, min_reliability: %s, draws: %s, controls: [{kind: ablation, name: ablation},
{kind: split, name: oracle, split: induction}, {kind: first_moment, name: other, draws: %s},
{kind: gradient, name: aligned, split: induction}, {kind: loss_contrast, name: earlier, checkpoint: initialisation},
{kind: permuted, name: within, within: domain}]}"""
HEADS = ["layer.1.head.0", "layer.1.head.1"]
OTHER = {"antithetic": "chains", "chains": "antithetic"}


def settings(directory: Path, draws: str, min_reliability: float = -1, *more: str):
    observables = "[{kind: component_loss, name: component}, {kind: free_energy, name: energy}]"
    return tiny_config(
        directory,
        "sampling.components=[{name: layer.*.head.*}]",
        f"sampling.observables={observables}",
        "response.direction=null",
        f"solve={SOLVE % (min_reliability, draws, OTHER[draws])}",
        *more,
    )


@pytest.fixture(scope="module", params=["antithetic", pytest.param("chains", marks=pytest.mark.extended)])
def solved(request, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory):
    """Draws, subjects in this process and run directory of weights that are solved for."""
    run = copy_run(tiny_run, tmp_path_factory.mktemp(request.param))
    config = settings(run.path, request.param)
    sample(config, run, quiet())
    solve(config, run, quiet())
    return config, subjects_of(config, run.path), run


def rises_by_hand(config, subjects, run: RunDirectory, subject: str, samples, draws: str | None = None) -> np.ndarray:
    """[replicate, sample, position]"""
    target = subjects.target(subject)
    if (draws or config.solve.draws) == "antithetic":
        gamma = subjects.posterior(subject).localization
        groups = [antithetic_pair(target, number, seed=config.seed, gamma=gamma) for number in range(3)]
    else:
        kept = read_positions(run.storage, subject, range(3))
        groups = [[unflatten(position, target.center) for position in of_chain] for of_chain in kept]
    return mean_rises(target, target.prepare(samples), groups).numpy()


def test_the_component_is_the_one_that_raises_the_loss_most(solved):
    config, subjects, run = solved
    solution = json.loads((run.path / "weights" / "solution.json").read_text())
    found = solution["mean_rises"]
    assert list(found) == HEADS  # of the four that are sampled, those that are asked for
    for subject, rise in found.items():
        by_hand = rises_by_hand(config, subjects, run, subject, subjects.probe.samples).mean()
        assert rise == pytest.approx(by_hand, rel=1e-4, abs=1e-7)
    assert solution["subject"] == max(found, key=found.get)


def test_every_loss_of_the_pool_has_its_first_moment(solved):
    config, subjects, run = solved
    solution = json.loads((run.path / "weights" / "solution.json").read_text())
    rises = rises_by_hand(config, subjects, run, solution["subject"], subjects.task.train)
    wanted = rises.mean(axis=0).ravel()
    pool = pq.read_table(run.path / "response" / "pool.parquet")
    np.testing.assert_allclose(pool["chi_energy"], wanted - wanted.mean(), rtol=1e-3, atol=2e-6)
    per_replicate = rises.reshape(3, -1)
    per_replicate = per_replicate - per_replicate.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(
        pool["se_energy"], per_replicate.std(axis=0, ddof=1) / 3**0.5, rtol=1e-2, atol=2e-6
    )  # all of this pool is scored replicate by replicate
    replicates = {"antithetic": "pairs of draws", "chains": "chains"}[config.solve.draws]
    assert solution["replicates"] == {"of": replicates, "number": 3}
    # n_beta / n times the scores times h, and the target is to go down.
    h = pq.read_table(run.path / "weights" / "plus.parquet")["weight"].to_numpy().astype(float) - 1
    response = 50 / len(wanted) * wanted @ h
    assert response < 0
    assert solution["arms"]["plus"]["predicted_response"]["energy"]["value"] == pytest.approx(response, rel=1e-3)


def test_controls_have_the_share_of_plus_and_their_own_scores(solved):
    config, subjects, run = solved
    solution = json.loads((run.path / "weights" / "solution.json").read_text())
    weights = {
        arm: pq.read_table(run.path / "weights" / f"{arm}.parquet")["weight"].to_numpy() for arm in solution["arms"]
    }
    assert list(weights) == [
        *("plus", "minus", "permuted", "ablation", "oracle"),
        *("other", "aligned", "earlier", "within"),
    ]
    for table in weights.values():
        assert table.sum() ** 2 / (len(table) * (table**2).sum()) == pytest.approx(0.8, abs=1e-3)
    target = subjects.target(solution["subject"])
    nothing = unflatten(0 * flatten(target.center), target.center)
    rises = mean_rises(target, target.prepare(subjects.task.train), [[nothing]]).numpy().ravel()

    def follows(name: str, row: np.ndarray) -> float:
        inside = (weights[name] > 0) & (weights[name] < 4)
        return np.corrcoef(row[inside], weights[name][inside])[0, 1]

    assert follows("ablation", rises) < -0.999  # as asked: down
    # First moments from the other draws, as solve.draws would have them: the chains' positions were kept for that.
    by_hand = rises_by_hand(
        config, subjects, run, solution["subject"], subjects.task.train, OTHER[config.solve.draws]
    ).reshape(3, -1)
    assert follows("other", by_hand.mean(axis=0)) < -0.999
    found = solution["arms"]["other"]
    assert found["replicates"]["number"] == 3
    centred = by_hand - by_hand.mean(axis=1, keepdims=True)
    assert found["reliability"] == pytest.approx(split_half_reliability(centred[:, None])[0], abs=0.01)
    # Losses where the training began, less those at the checkpoint.
    held = target.losses(target.prepare(subjects.task.train)).numpy().ravel()
    fresh = subjects.task.build(config.seed)
    began = all_losses(lambda batch: subjects.task.losses(fresh, batch), subjects.task.train, Ranks(), 8, "cpu")
    assert follows("earlier", began.numpy().ravel() - held) > 0.999
    np.testing.assert_array_equal(np.sort(weights["within"]), np.sort(weights["plus"]))
    [(_, mask)] = subjects.task.split("induction", subjects.task.train, np.arange(len(subjects.task.train)))
    assert weights["oracle"][mask.ravel()].min() > 1 > weights["oracle"][~mask.ravel()].max()


@pytest.mark.parametrize("solved", ["antithetic"], indirect=True)
def test_a_second_round_is_read_off_a_copy_that_was_annealed_on_plain_weights(solved):
    _, plain, run = solved
    arms = "retrain.arms=[{name: online, weights: plus, rounds: 2}]"
    config = settings(run.path, "antithetic", -1, arms, "training.anneal_steps=4")
    retrain(config, run, quiet())
    first, second = (f"retrain/online/seed-0/round-{number}" for number in (1, 2))
    hand = TrainingJob("by hand", run.path / "hand", [], seed=0, num_steps=0, anneal_steps=4, start=first)
    run_jobs(config, run, [hand], "training", quiet(), 1)
    found, expected = (load_file(run.path / name / "model.safetensors") for name in (f"{first}/annealed", "hand"))
    assert all(found[name].equal(weight) for name, weight in expected.items())
    raw = load_file(run.path / first / "model.safetensors")
    assert any(not found[name].equal(weight) for name, weight in raw.items())

    by_name = {name: Subject(f"{first}/annealed", name, f"{first}/annealed/{name}") for name in HEADS}
    subjects = Subjects(plain.task, plain.sampling, config.seed, run.path, by_name)
    solution = json.loads((run.path / second / "solution.json").read_text())
    on_probe = [rises_by_hand(config, subjects, run, name, subjects.probe.samples).mean() for name in HEADS]
    assert list(solution["mean_rises"].values()) == pytest.approx(on_probe, rel=1e-4, abs=1e-7)
    chosen = HEADS[int(np.argmax(on_probe))]
    assert solution["subject"] == f"{first}/annealed/{chosen}"
    rises = rises_by_hand(config, subjects, run, chosen, plain.task.train).mean(axis=0).ravel()
    solved_by_hand = solve_for_effective_sample_share(
        (rises - rises.mean())[None].astype(float), np.array([-1.0]), 0.8,
        inverse_temperature=50, weight_min=0, weight_max=4,
    )  # fmt: skip
    weights = pq.read_table(run.path / second / "weights.parquet")["weight"].to_numpy()
    np.testing.assert_allclose(weights, solved_by_hand.weights, atol=2e-3)  # rises are differences of float32 losses
    before = pq.read_table(run.path / "weights" / "plus.parquet")["weight"].to_numpy()
    assert np.abs(weights - before).mean() > 0.01
    assert not (run.path / "sampling" / "retrain").exists()  # no chains

    written = {path: path.stat().st_mtime_ns for path in (run.path / "retrain").rglob("*") if path.is_file()}
    retrain(config, run, quiet())
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_scores_that_do_not_repeat_make_no_weights(solved):
    config, _, run = solved
    strict = settings(run.path, config.solve.draws, min_reliability=0.999)
    with pytest.raises(PatterningError, match=r"solve.targets.energy: .*split-half reliability of -?0\.\d+.*0\.999"):
        solve(strict, run, quiet())
