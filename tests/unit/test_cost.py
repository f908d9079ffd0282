"""Strengths that a cost allows: how they are looked for, and what weights at one of them are reported as."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_run import quiet

from patterning_dist.errors import PatterningError
from patterning_dist.stages import cost
from patterning_dist.stages.cost import hold_cost, next_scale, scale_arm


@pytest.mark.parametrize(
    ("slope", "bend", "largest", "crossing"),
    [
        (0.05, 0.19, 0.001, 0.018674),
        (0.0, 0.2, 0.01, 0.223607),
        (-0.01, 0.2, 0.05, 0.525625),
        (0.3, 0.0, 0.09, 0.3),
        (0.3, -0.1, 0.09, 0.338105),
    ],
)
def test_the_crossing_is_found_in_a_few_walks(slope: float, bend: float, largest: float, crossing: float) -> None:
    assert slope * crossing + bend * crossing**2 == pytest.approx(largest, rel=1e-4)
    costs = {s: slope * s + bend * s * s for s in (1.0, 0.5, 0.25)}
    for _ in range(3):
        if (scale := next_scale(costs, largest)) is None:
            break
        costs[scale] = slope * scale + bend * scale * scale
    found = max(s for s, cost in costs.items() if cost <= largest)
    assert 0.9 * largest <= costs[found] <= largest and found < crossing


def test_all_of_the_strength_is_taken_where_it_costs_no_more() -> None:
    assert next_scale({1.0: 0.03, 0.5: 0.01, 0.25: 0.002}, 0.05) is None
    assert next_scale({1.0: -0.03, 0.5: -0.01, 0.25: -0.002}, 0.05) is None


def test_where_there_is_no_prediction_the_cost_is_without_bound() -> None:
    assert next_scale({1.0: math.inf, 0.5: math.inf, 0.25: 0.002}, 0.05) == pytest.approx(0.375)


def held(patch: pytest.MonkeyPatch, largest: float, width: float) -> dict[str, Any]:
    """The overall loss rises by 0.02 s + 0.04 s^2, in an interval of ``width`` s to both sides."""

    def predicted(here: Any, window: Any, walk: str, base: str, seen: int) -> dict[str, Any]:
        s = float(walk.partition("@")[2])
        value = 0.02 * s + 0.04 * s * s
        return {"observables": {"all": {"value": value, "interval": [value - width * s, value + width * s]}}}

    patch.setattr(
        cost, "walk_subjects", lambda config, run, subjects, windows, progress: (None, {n: n for n in subjects})
    )
    patch.setattr(cost, "predicted_change", predicted)
    for name in ("window_of", "num_trained"):
        patch.setattr(cost, name, lambda *_: None)
    config: Any = SimpleNamespace(
        model=None,
        solve=SimpleNamespace(max_cost=largest),
        retrain=SimpleNamespace(arm_list=[SimpleNamespace(weights="plus", start="baseline", window=None)], seeds=[0]),
        sampling=SimpleNamespace(observables=[SimpleNamespace(kind="split_loss", split="overall", name="all")]),
    )
    run: Any = None
    return hold_cost(config, run, {"plus": "weights/unscaled/plus.parquet"}, quiet())["plus"]


def test_it_is_the_upper_end_of_the_interval_that_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    found = held(monkeypatch, 0.06, 0.0)
    assert found["scale"] == 1 and found["tried"][-1] == pytest.approx([1, 0.06])
    found = held(monkeypatch, 0.06, 0.05)
    assert 0.9 * 0.06 <= found["overall"]["interval"][1] <= 0.06 and found["scale"] < 1
    # 0.07 s + 0.04 s^2 = 0.06 at s = 0.6306.
    assert found["scale"] == pytest.approx(0.6306, rel=0.1)
    assert found["tried"][-1] == pytest.approx([1, 0.11])


def test_an_interval_that_is_too_wide_at_every_strength_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PatterningError, match=r"upper end of what plus .* more than 1e-06 nats.*evaluation_sequences"):
        held(monkeypatch, 1e-6, 2.0)


def test_weights_at_a_scale_are_reported_as_they_are() -> None:
    rng = np.random.default_rng(0)
    weights = rng.gamma(2.0, size=500)
    weights /= weights.mean()
    response = {"value": -0.4, "standard_error": 0.1, "interval": np.array([-0.6, -0.2])}
    entry = {
        "strength": 0.8,
        "predicted_response": {"gap": dict(response)},
        "cross_fitted_response": {"gap": dict(response)},
        "histogram": {"edges": np.linspace(0, 8, 49), "counts": np.zeros(48, int)},
    }
    scaled = scale_arm(weights, entry, {"scale": 0.3})
    np.testing.assert_allclose(scaled, 0.7 + 0.3 * weights)
    assert entry["strength"] == pytest.approx(0.24)
    for kind in ("predicted_response", "cross_fitted_response"):
        np.testing.assert_allclose(entry[kind]["gap"]["interval"], [-0.18, -0.06])
        assert entry[kind]["gap"]["value"] == pytest.approx(-0.12)
    assert entry["effective_sample_share"] == pytest.approx(1 / (1 + 0.09 * weights.var()))
    assert entry["effective_sample_size"] == pytest.approx(500 * entry["effective_sample_share"])
    assert entry["top_percent_share"] == pytest.approx(np.sort(scaled)[-5:].sum() / 500)
    np.testing.assert_array_equal(entry["histogram"]["counts"], np.histogram(scaled, 48, (0, 8))[0])
