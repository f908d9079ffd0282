"""What is said of an arm beforehand: by the posterior's linear response, by chains under its weights, by its window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Kind -> what its intervals cover. Halving: the window in half its segments; model: what else the window leaves out.
COVERS = {
    "solved": ["chains"],
    "cross_fitted": ["chains"],
    "predicted": ["sequences", "seeds", "halving", "model"],
    "checked": ["chains"],
}


def predictions(
    solution: Mapping[str, Any],
    checked: Mapping[str, Any],
    windows: Mapping[str, Any],
    arms: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Kind -> arm -> observable -> estimate and what its interval ``covers``, of every arm that something is said of.

    ``solved`` is the linear response that weights were solved for, ``cross_fitted`` the same on chains that were not
    solved on, ``predicted`` what the window of the training comes to, ``checked`` what chains under the weights do.

    Args:
        solution: content of weights/solution.json; may be empty.
        checked: content of check/response.json; may be empty.
        windows: content of predict/response.json; may be empty.
        arms: name -> ``weights``, ``strength`` and ``rounds`` of the arms that are retrained; the solutions themselves
            are named in any case. Weights that change on the way are none that a prediction is of.
    """
    solved = {arm: entry for arm, entry in solution.get("arms", {}).items() if "predicted_response" in entry}
    given = {arm: {"weights": arm, "strength": 1.0} for arm in solved} | dict(arms)
    found: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in COVERS}
    for arm, entry in windows.get("arms", {}).items():
        if "observables" in entry:
            found["predicted"][arm] = dict(entry["observables"])
    for arm, entry in given.items():
        weights, strength = entry.get("weights"), entry.get("strength", 1.0)
        if weights not in solved or entry.get("rounds", 1) > 1:
            continue
        for kind, key in (("solved", "predicted_response"), ("cross_fitted", "cross_fitted_response")):
            linear = solved[weights].get(key) or {}
            found[kind][arm] = {name: _scaled(value, strength) for name, value in linear.items()}
        measured = (checked.get("strengths") or {}).get(f"{strength:+g}")
        if measured and checked.get("weights") == weights:
            found["checked"][arm] = {name: value for name, value in measured.items() if name != "loss"}  # of the probe
    replicates = [(solution.get("replicates") or {}).get("of", "chains")]
    covers = COVERS | {"solved": replicates, "cross_fitted": replicates}
    return {
        kind: {
            arm: {name: {**value, "covers": covers[kind]} for name, value in of.items()} for arm, of in by_arm.items()
        }
        for kind, by_arm in found.items()
    }


def _scaled(estimate: Mapping[str, Any], strength: float) -> dict[str, Any]:
    """The linear response at a multiple of h."""
    found = {key: _times(estimate.get(key), strength) for key in ("value", "standard_error")}
    return found | {"interval": estimate.get("interval") and [_times(end, strength) for end in estimate["interval"]]}


def _times(number: float | None, factor: float) -> float | None:
    """What one chain cannot tell is not there."""
    return None if number is None else number * factor
