"""Which arms have a window, and what is said where there is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from patterning_dist.config import TrainingConfig
from patterning_dist.config.training import Arm
from patterning_dist.config.window import without_window
from patterning_dist.response.contrast import split_contrast
from patterning_dist.stages.windows import predicted_change

NUM = 200
WINDOW = {"optimizer": "adamw", "learning_rate": 1e-3, "num_steps": 20}
RNG = np.random.default_rng(0)


def arm(**changes: Any) -> Arm:
    return Arm(**({"name": "mine", "weights": "plus", "start": "baseline", "seeds": [0]} | changes))


@pytest.mark.parametrize(
    ("changes", "optimizer", "reason"),
    [
        ({}, "adamw", None),
        ({"strength": 0.5}, "sgd", None),
        ({"start": "initialisation"}, "adamw", "from scratch"),
        ({}, "muon", "muon"),
        ({"window": WINDOW}, "muon", None),
        ({"window": WINDOW, "start": "initialisation"}, "adamw", "from scratch"),
        ({"weighting": "draw"}, "adamw", "drawn"),
        ({"weighted_share": 0.5}, "adamw", "part of its steps"),
        ({"rounds": 2}, "adamw", "change on the way"),
    ],
)
def test_an_arm_without_a_window_has_a_reason(changes: dict[str, Any], optimizer: str, reason: str | None) -> None:
    config = SimpleNamespace(training=TrainingConfig(batch_size=8, optimizer=optimizer))
    found = without_window(config, arm(**changes))
    assert found is None if reason is None else reason in str(found)


def prediction(growth: float, shift: float, bend: float = 0.0, spread: float = 0.0, num_seen: int = 4096) -> dict:
    """Of an arm whose samples all move by ``shift``, and by ``bend`` more where the window is walked in one step."""
    coefficients = np.full((1, NUM), 1 / NUM)
    held_out = SimpleNamespace(names=("all",), coefficients=torch.from_numpy(coefficients), groups=np.arange(NUM))
    base = RNG.normal(3, 1, (2, 1, NUM, 1)) * coefficients[None, :, :, None] * [1, 0]
    moved = base + np.array([shift + bend, shift])[:, None, None, None] * coefficients[None, :, :, None] * [1, 0]
    walks = [
        {
            "growth": np.array([growth]),
            "parts": parts,
            "metrics": metrics,
            "names": ["accuracy"],
            "spread": noise,
            "metric_spread": 2 * noise,
        }
        for parts, metrics, noise in (
            (moved, np.array([[0.7], [0.72]]), np.array([[3 + spread], [-spread]])),
            (base, np.array([[0.6], [0.61]]), np.array([[3.0], [0.0]])),
        )
    ]
    subjects, window = (
        SimpleNamespace(held_out=held_out),
        SimpleNamespace(tau=10.0, factors=(1.0,) * 32, num_samples=4096, training=SimpleNamespace(batch_size=64)),
    )
    return predicted_change(subjects, window, *walks, num_seen)


def test_beyond_the_window_there_is_no_number() -> None:
    found = prediction(1.6, -0.1)
    assert "observables" not in found and "e^1.6, beyond e^1.5" in found["outside"]


def test_losses_that_are_not_finite_are_no_prediction() -> None:
    found = prediction(0.3, float("nan"))
    assert "observables" not in found and "not finite" in found["outside"]


def test_the_interval_knows_how_far_one_step_and_two_are_apart() -> None:
    straight, bent = (prediction(0.3, -0.1, bend)["observables"]["all"] for bend in (0.0, 0.04))
    assert straight["value"] == bent["value"] == pytest.approx(-0.1)
    # Samples that all move alike have no sampling error; what is left is a tenth of the value, and the bend.
    assert straight["standard_error"] == pytest.approx(0.01, rel=1e-6)
    assert bent["standard_error"] == pytest.approx(np.hypot(0.01, 0.04), rel=1e-6)
    assert straight["interval"] == pytest.approx([-0.1 - 1.96 * 0.01, -0.1 + 1.96 * 0.01], rel=1e-4)


def test_the_contrast_of_nothing_is_nothing() -> None:
    shares = np.full((1, NUM, 2), [1 / NUM, 0.0])
    assert split_contrast(np.zeros((1, NUM, 2)), shares, np.arange(NUM)).standard_error[0] == 0


def test_trainings_differ_by_the_order_of_their_data() -> None:
    """Draws of arm and base, which are the same ones, differ by 0.02 and -0.02; a training sees 2048 samples."""
    for num_seen, samples in ((2048, 1 + 0.5), (3 * 2048, 1 / 3 + 0.5)):
        found = prediction(0.3, -0.1, spread=0.02, num_seen=num_seen)["observables"]["all"]
        assert found["order_error"] == pytest.approx(0.02 * samples**0.5)
        assert found["standard_error"] == pytest.approx(np.hypot(0.01, found["order_error"]), rel=1e-6)


def test_metrics_have_an_interval_of_all_but_the_choice_of_samples() -> None:
    [(name, found)] = prediction(0.3, -0.1, spread=0.02, num_seen=4096)["metrics"].items()
    order = 0.04 * (2048 / 4096 * 2) ** 0.5
    error = (order**2 + 0.01**2 + 0.011**2) ** 0.5
    low, high = found.pop("interval")
    assert name == "accuracy" and (low, high) == pytest.approx((0.11 - 1.96 * error, 0.11 + 1.96 * error), rel=1e-4)
    expected = {"value": 0.11, "in_half_the_segments": 0.1, "sampling_error": 0, "order_error": order}
    assert found == pytest.approx(expected | {"standard_error": error})
