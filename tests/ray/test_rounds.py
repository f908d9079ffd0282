"""An arm in rounds: each part is what it is by hand, and nothing is done twice, wherever a driver has died."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from tiny_run import copy_run, finish_inputs, quiet, subjects_of, tiny_config

from patterning_dist.aggregation.files import read_gradients
from patterning_dist.config import Config
from patterning_dist.driver import run_stages
from patterning_dist.errors import PatterningError
from patterning_dist.measure.subject import Subject
from patterning_dist.measure.subjects import Subjects
from patterning_dist.response.solver import solve_for_effective_sample_share
from patterning_dist.runtime.training.jobs import run_jobs
from patterning_dist.stages import online, train
from patterning_dist.stages.rounds import rounds_of
from patterning_dist.storage.run import RunDirectory
from patterning_dist.training.job import JOB_FILES, TrainingJob

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow]

FOLDER = "retrain/online/seed-0"
FIRST, SECOND = f"{FOLDER}/round-1", f"{FOLDER}/round-2"
SUBJECT = f"{FIRST}/everything"


class Died(Exception):
    """What ends a driver in these tests."""


def die(*_: object, **__: object) -> None:
    raise Died


def settings(directory: Path) -> Config:
    arms = "[base, plus, {name: online, weights: plus, rounds: 2}]"
    return tiny_config(
        directory,
        "sampling.components=[{name: everything}]",
        "retrain.start=baseline",
        "retrain.evaluate_every=3",
        f"retrain.arms={arms}",
    )


def times(run: RunDirectory, *folders: str) -> dict[Path, int]:
    found = (path for folder in folders for path in (run.path / folder).rglob("*") if path.is_file())
    return {path: path.stat().st_mtime_ns for path in found}


@pytest.fixture(scope="module")
def finished(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RunDirectory]:
    """A run whose driver died twice on the way: before the pool was scored, and before the second round trained."""
    run = copy_run(tiny_run, tmp_path_factory.mktemp("rounds"))
    config = settings(run.path)
    finish_inputs(config, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "scored", die)
        with pytest.raises(Died):
            run_stages(config, None, run.path)
    before = times(run, FIRST, f"sampling/{SUBJECT}")
    assert run.path / FIRST / "evaluation.json" in before and not (run.path / SECOND).exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "described", lambda *_: {"reliability": {"induction": 0.0}})
        with pytest.raises(PatterningError, match="so the weights of online seed 0, round 2 of 2 would be noise"):
            run_stages(config, None, run.path)
    trained = train.run_unfinished

    def until_round_2(*arguments):
        return die() if arguments[3].startswith("retraining, round 2") else trained(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "run_unfinished", until_round_2)
        with pytest.raises(Died):
            run_stages(config, None, run.path)
    assert times(run, FIRST, f"sampling/{SUBJECT}") == before
    before = times(run, FIRST, f"sampling/{SUBJECT}", SECOND, f"scores/{SUBJECT}")
    assert run.path / SECOND / "weights.parquet" in before
    run_stages(config, None, run.path)
    after = times(run, FIRST, f"sampling/{SUBJECT}", SECOND, f"scores/{SUBJECT}")
    assert {path: after[path] for path in before} == before
    return config, run


def test_the_chains_are_around_the_first_round_and_on_its_loss(finished: tuple[Config, RunDirectory]) -> None:
    config, run = finished
    plain = subjects_of(config, run.path)
    for weights, is_the_same in (("weights/plus.parquet", True), (None, False)):
        by_name = {SUBJECT: Subject(FIRST, "everything", stream=SUBJECT, weights=weights)}
        subjects = Subjects(plain.task, plain.sampling, config.seed, run.path, by_name, gradients_of=frozenset(by_name))
        chain = subjects.chain(SUBJECT, 1)
        assert len(list(chain.draws())) == 12
        means = chain.statistics["gradients"].result()["means"]
        assert np.array_equal(means, read_gradients(run.storage, SUBJECT, [1])[0]) == is_the_same


def test_the_weights_are_solved_for_from_the_scores_there(finished: tuple[Config, RunDirectory]) -> None:
    _, run = finished
    chi = np.concatenate(
        [
            np.load(run.path / "scores" / SUBJECT / f"pool-{number}.npz")["scores"]
            for number in range(len(list((run.path / "scores" / SUBJECT).glob("pool-*.npz"))))
        ],
        axis=1,
    )
    solved = solve_for_effective_sample_share(
        chi - chi.mean(axis=1, keepdims=True, dtype=np.float64), np.array([-1.0]), 0.7,
        inverse_temperature=50, weight_min=0, weight_max=4,
    )  # fmt: skip
    weights = pq.read_table(run.path / SECOND / "weights.parquet")["weight"].to_numpy()
    np.testing.assert_allclose(weights, solved.weights, atol=1e-4)  # the scores are float32, centred in either order
    assert weights.mean() == pytest.approx(1, abs=1e-6)
    first = pq.read_table(run.path / "weights" / "plus.parquet")["weight"].to_numpy()
    assert np.abs(weights - first).mean() > 0.01
    solution = json.loads((run.path / SECOND / "solution.json").read_text())
    assert solution["subject"] == SUBJECT
    assert solution["effective_sample_share"] == pytest.approx(0.7, abs=1e-3)
    assert solution["target"] == {"induction": -1} and set(solution["predicted_response"]) == {"induction"}


def test_the_second_round_trains_on_from_the_first(finished: tuple[Config, RunDirectory]) -> None:
    config, run = finished
    hand = TrainingJob(
        name="by hand",
        folder=run.path / "hand",
        inputs=[],
        seed=rounds_of(config, 2)[0].data_seed,
        num_steps=3,
        evaluate_every=3,
        start=FIRST,
        weights=run.path / SECOND / "weights.parquet",
    )
    run_jobs(config, run, [hand], "training", quiet(), 1)
    found, expected = (load_file(path / "model.safetensors") for path in (run.path / FOLDER, hand.folder))
    assert found.keys() == expected.keys() and all(found[name].equal(w) for name, w in expected.items())
    start, end = (load_file(run.path / SECOND / f"{name}.safetensors") for name in ("initial", "model"))
    assert all(w.equal(start[name]) for name, w in load_file(run.path / FIRST / "model.safetensors").items())
    assert any(not w.equal(start[name]) for name, w in end.items())


def test_the_arm_has_what_every_arm_has(finished: tuple[Config, RunDirectory]) -> None:
    _, run = finished
    assert {path.name for path in (run.path / FOLDER).iterdir()} == {*JOB_FILES, "round-1", "round-2"}
    begun, base = (load_file(run.path / folder / "initial.safetensors") for folder in (FOLDER, "retrain/base/seed-0"))
    assert all(w.equal(base[name]) for name, w in begun.items())
    online, plus = (
        pq.read_table(run.path / folder / "metrics.parquet").to_pydict() for folder in (FOLDER, "retrain/plus/seed-0")
    )
    assert online["step"] == plus["step"] == [0, 3, 6]
    assert sorted(online["seconds"]) == online["seconds"]
    # The first half is that of the arm plus: same data in the same order under the same weights.
    losses, of_plus = online["validation_loss"], plus["validation_loss"]
    assert losses[:2] == of_plus[:2] and losses[2] != of_plus[2]
    report = json.loads((run.path / FOLDER / "evaluation.json").read_text())
    assert report["validation_loss"] == losses[2]
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["arms"]["online"]["rounds"] == 2
    assert set(summary["contrasts"]["online"]["base"]) >= {"induction", "validation_loss"}
    assert list(summary["rounds"]) == ["online seed 0, round 2 of 2"]
    assert "online" not in summary["solved"]  # its weights are not those that were predicted for
    assert "online seed 0, round 2 of 2" in (run.path / "report.html").read_text()


def test_nothing_is_done_twice(finished: tuple[Config, RunDirectory]) -> None:
    config, run = finished
    before = times(run, "retrain", "sampling", "scores")
    train.retrain(config, run, quiet())
    assert times(run, "retrain", "sampling", "scores") == before
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [e["job"] for e in events if e["kind"] == "job_kept"][-4:] == [
        "base seed 0", "plus seed 0", "online seed 0, round 1 of 2", "online seed 0, round 2 of 2"
    ]  # fmt: skip
    assert events[-2]["kind"] == "weights_kept"
    # What is missing of the arm's own folder is put together again, and damaged weights are solved for again: the same.
    model = run.path / FOLDER / "model.safetensors"
    weights = model.read_bytes()
    model.unlink()
    table = run.path / SECOND / "weights.parquet"
    content = table.read_bytes()
    table.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    train.retrain(config, run, quiet())
    assert table.read_bytes() == content
    assert model.read_bytes() == weights
