"""Strengths that a cost allows: how they are looked for, and what weights at one of them are reported as."""

from __future__ import annotations

import math

import numpy as np
import pytest

from patterning_dist.stages.cost import next_scale, scale_arm


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
