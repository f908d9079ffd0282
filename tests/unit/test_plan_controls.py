"""What stage solve is said to take for the controls: their passes over the pool, sample by sample."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from pydantic import TypeAdapter

from patterning_dist.config.controls import ControlConfig
from patterning_dist.response.cost import Seconds
from patterning_dist.stages.plan.passes import control_tasks, moment_seconds

OPENING, SAMPLE, NUM_SAMPLES, NUM_HELD_OUT = 2.0, 0.01, 600, 40


def chains(*controls: dict, draws: str = "antithetic") -> SimpleNamespace:
    """As much of the chains as it takes: a draw measures 30 probe and 20 held-out samples."""
    read = TypeAdapter(ControlConfig).validate_python
    solve = SimpleNamespace(draws=draws, num_draws=5, controls=[read({"name": "c"} | control) for control in controls])
    times = SimpleNamespace(opening=Seconds.about(OPENING, 0), draw=Seconds.about(SAMPLE * 50, 0))
    return SimpleNamespace(
        config=SimpleNamespace(solve=solve),
        subjects=SimpleNamespace(
            task=SimpleNamespace(train=range(NUM_SAMPLES)),
            probe=SimpleNamespace(ids=range(30)),
            held_out=SimpleNamespace(samples=range(20)),
            split_loss=lambda split: SimpleNamespace(samples=range(NUM_HELD_OUT)),
        ),
        counts={"head": SimpleNamespace(num_chains=3)},
        standing_for={"head": "head"},
        probe=SimpleNamespace(chains={"head": times}, starting=Seconds.about(0.0, 0), num_workers=1),
    )


@pytest.mark.parametrize(
    ("control", "passes", "tasks"),
    [
        ({"kind": "ablation"}, 3 * NUM_SAMPLES, 3),
        # Draws of three chains and the centre, on the pool and on the part scored by chain, which is all of it here.
        ({"kind": "first_moment", "draws": "chains"}, 17 * 2 * NUM_SAMPLES, 7),
        ({"kind": "first_moment", "draws": "antithetic"}, 12 * 2 * NUM_SAMPLES, 7),
        ({"kind": "gradient", "split": "rest"}, 3 * NUM_SAMPLES + 4 * NUM_HELD_OUT, 4),
        (
            {"kind": "influence", "split": "rest", "conjugate_gradient_iterations": 5, "hessian_sequences": 8},
            3 * NUM_SAMPLES + 4 * NUM_HELD_OUT + 8 * 5 * 8,
            4,
        ),
        ({"kind": "loss_contrast", "checkpoint": "early"}, 4 * NUM_SAMPLES, 6),
        ({"kind": "permuted", "within": "token"}, 0, 0),
        ({"kind": "split", "split": "rest"}, 0, 0),
        ({"kind": "scores", "path": "mine.parquet"}, 0, 0),
        ({"kind": "minimum_norm"}, 0, 0),
    ],
)
def test_a_control_costs_its_passes(control: dict, passes: int, tasks: int) -> None:
    found = control_tasks(chains(control), "head")
    assert len(found) == tasks
    assert sum(task.value for task in found) == pytest.approx(OPENING * tasks + SAMPLE * passes)


def test_a_first_moment_control_costs_what_the_scores_of_those_draws_do() -> None:
    other = control_tasks(chains({"kind": "first_moment", "draws": "chains"}), "head")
    assert sum(task.value for task in other) == pytest.approx(moment_seconds(chains(draws="chains"), ["head"]).value)
