"""What stage validate is said to take: a bank of short retrainings, scores method by method, losses of the queries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from patterning_dist.config.validation import ValidationConfig
from patterning_dist.response.cost import Seconds
from patterning_dist.runtime.probe.training import JobTimes, StepTimes
from patterning_dist.stages.plan import validate
from patterning_dist.stages.plan.training import Trainings
from patterning_dist.stages.plan.validate import num_trainings, plan_validate

OPENING, SAMPLE, STEP, POOL, QUERIES = 2.0, 0.01, 0.5, 600, 6
JOB = JobTimes(*(Seconds.about(value, 0) for value in (10.0, 3.0, 0.2, 0.0, 1.0, 5.0)))


@pytest.fixture(autouse=True)
def _queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "held_out_ids", lambda *_: {"a": range(4), "b": range(2)})


def config(**changes: Any) -> SimpleNamespace:
    settings = {"methods": ["gradient"], "num_subsets": 7, "num_steps": 20, "seeds": [1, 2]} | changes
    sampling = SimpleNamespace(batch_size=8, ranks_per_chain=1, threads_per_worker=1)
    response = SimpleNamespace(direction=None)
    return SimpleNamespace(validation=ValidationConfig(**settings), sampling=sampling, response=response, seed=0)


def chains(of: SimpleNamespace, num_workers: int = 1) -> SimpleNamespace:
    """As much of the chains as it takes: a draw measures 30 probe and 20 held-out samples."""
    times = SimpleNamespace(
        opening=Seconds.about(OPENING, 0), draw=Seconds.about(SAMPLE * 50, 0), step=Seconds.about(STEP, 0)
    )
    probe = SimpleNamespace(
        chains={"w": times}, starting=Seconds.about(0.0, 0), num_workers=num_workers, process_bytes=1
    )
    subjects = SimpleNamespace(
        task=SimpleNamespace(train=range(POOL), num_positions=None),
        probe=SimpleNamespace(ids=range(30)),
        held_out=SimpleNamespace(samples=range(20)),
        by_name={"w": SimpleNamespace(component="everything", half_step=False)},
    )
    counts = {"w": SimpleNamespace(num_chains=3)}
    again = SimpleNamespace(seconds=Seconds.about(100.0, 0))
    return SimpleNamespace(
        config=of, subjects=subjects, counts=counts, standing_for={"w": "w"}, probe=probe,
        plan_again=lambda stage, subject, times: again,
    )  # fmt: skip


def trainings(of: SimpleNamespace, num_queues: int = 1) -> Trainings:
    return Trainings(of, StepTimes(num_queues, JOB.step, Seconds.about(0.5, 0), 1000, 0, 0, 2), JOB)  # type: ignore[arg-type]


def test_every_subset_and_every_removal_is_trained_with_every_seed() -> None:
    task: Any = None
    assert num_trainings(config(), task) == (8 * 2, 0)
    # Random scores are measured in any case, and scores that are given are too.
    assert num_trainings(config(removed_share=0.1), task) == (16, 2 * QUERIES * 2)
    both = config(removed_share=0.1, removed_token_share=0.1, scores={"mine": "folder"})
    assert num_trainings(both, task) == (16, 2 * 3 * QUERIES * 2)
    assert num_trainings(config(bank="folder", num_steps=None), task) == (0, 0)


def test_seconds_are_those_of_the_bank_of_scores_and_of_losses() -> None:
    of = config()
    one = 3.0 + 20 * 0.2 + 0.5 + 1.0
    bank = 10.0 + 16 * one + 5.0
    scores = QUERIES * (OPENING + 2 * POOL * SAMPLE)
    losses = 2 * OPENING + 16 * (OPENING + QUERIES * SAMPLE)
    found = plan_validate(chains(of), trainings(of))
    assert found.seconds.value == pytest.approx(bank + scores + losses)
    assert found.what.startswith("16 trainings on subsets and all, 0 without what scores single out, of 20 steps")
    assert found.process_bytes == 2 and found.details == {"num_trainings": 16}
    # Initial and final weights, and a float32 score of every sample, of two methods.
    assert found.disk_bytes == 2 * 16 * 1000 + 2 * QUERIES * POOL * 4


def test_trainings_are_side_by_side_and_in_stacks() -> None:
    alone, stacked = config(), config(engine="stacked")
    one = 3.0 + 20 * 0.2 + 0.5 + 1.0
    saved = plan_validate(chains(alone), trainings(alone)).seconds.value
    assert saved - plan_validate(chains(alone), trainings(alone, 4)).seconds.value == pytest.approx(12 * one)
    # Sixteen networks are one stack.
    assert saved - plan_validate(chains(stacked), trainings(stacked)).seconds.value == pytest.approx(15 * one)


def test_methods_cost_what_they_do() -> None:
    def seconds(*methods: str, **changes: Any) -> float:
        of = config(methods=list(methods), **changes)
        return plan_validate(chains(of), trainings(of)).seconds.value

    nothing = seconds("bm25")
    along = QUERIES * (OPENING + 2 * POOL * SAMPLE)
    assert seconds("gradient") - nothing == pytest.approx(along)
    # Twenty products on 64 samples, each as long as three gradients of them.
    assert seconds("influence") - nothing == pytest.approx(along + QUERIES * 20 * 3 * STEP * 64 / 8)
    # Chains, and the pool in parts of 256 with the queries, at 5 draws of 3 chains.
    passes = 3 * OPENING + (POOL + 3 * QUERIES) * 15 * SAMPLE
    assert seconds("susceptibility", num_draws=5) - nothing == pytest.approx(100.0 + passes)


def test_a_bank_that_is_there_is_not_trained() -> None:
    of = config(bank="folder", num_steps=None)
    found = plan_validate(chains(of), None)
    losses = OPENING + 8 * (OPENING + QUERIES * SAMPLE)
    assert found.seconds.value == pytest.approx(QUERIES * (OPENING + 2 * POOL * SAMPLE) + losses)
    assert found.process_bytes == 1
