"""Effect against cost: the arms of every row of scores by strength, where at least one row has several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from patterning_dist.response.contrast import OVERALL
from patterning_dist.response.solver import share_at_strength
from patterning_dist.stages.arms import Arm, counterpart, same_training
from patterning_dist.stages.effects import ABLATED
from patterning_dist.stages.headline import VALIDATION

_ALIKE = ("weights", "weighting", "weighted_share", "rounds")  # of arms that differ in strength alone


def frontier(
    arms: list[Arm],
    contrasts: Mapping[str, Mapping[str, Mapping[str, Any]]],
    described: Mapping[str, Mapping[str, str]],
    targets: Iterable[str],
    solved: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What figures of effect against cost are drawn of; empty where no row of scores has arms at two strengths.

    Args:
        arms: of the run.
        contrasts: arm -> other -> metric -> difference.
        described: name -> label, unit and meaning.
        targets: observables that were asked for, which come first.
        solved: entries of solution.json by the name of the weights.

    Returns:
        ``cost``, the name of a loss; ``effects``, names; ``rows``, plain arm -> row of scores -> its arms with
        ``strength`` and ``share``, the effective sample share of their weights, from weak to strong.
    """
    rows: dict[str, dict[str, list[Arm]]] = {}
    for arm in arms:
        base = counterpart(arm, arms, None) if arm.settings.weights is not None else None
        if base is None or base.name not in contrasts.get(arm.name, {}):
            continue
        of_base = rows.setdefault(base.name, {})
        row = next((name for name, found in of_base.items() if _alike(found[0], arm)), None)
        weights = str(arm.settings.weights)
        of_base.setdefault(row or (arm.name if weights in of_base else weights), []).append(arm)
    drawn = {base: of for base, of in rows.items() if any(len(_strengths(found)) > 1 for found in of.values())}
    if not drawn:
        return {}
    there = {name for against in contrasts.values() for metrics in against.values() for name in metrics}
    # Losses are costs, and what is left without a head is no effect.
    shown = (name for name in described if not name.endswith("_loss") and name not in ABLATED)
    effects = [name for name in shown if described[name]["meaning"]]
    return {
        "cost": VALIDATION if VALIDATION in there else OVERALL,
        "effects": [name for name in dict.fromkeys([*targets, *effects]) if name in there and ":" not in name],
        "rows": {base: {row: _points(found, solved) for row, found in of.items()} for base, of in drawn.items()},
    }


def _alike(first: Arm, second: Arm) -> bool:
    settings = (first.settings, second.settings)
    return same_training(first, second) and all(len({str(getattr(s, key)) for s in settings}) == 1 for key in _ALIKE)


def _strengths(arms: list[Arm]) -> set[float]:
    return {arm.settings.strength for arm in arms}


def _points(arms: list[Arm], solved: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for arm in sorted(arms, key=lambda one: one.settings.strength):
        strength, share = arm.settings.strength, solved.get(str(arm.settings.weights), {}).get("effective_sample_share")
        found.append({"arm": arm.name, "strength": strength, "share": share and share_at_strength(share, strength)})
    return found
