"""One row for every arm and target: asked, solved for, predicted, checked, realised, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patterning_dist.config import Config
from patterning_dist.response.contrast import OVERALL, parts_of
from patterning_dist.response.solver import share_at_strength

Found = Mapping[str, Mapping[str, Mapping[str, Any]]]  # kind -> arm -> observable -> estimate
VALIDATION = "validation_loss"  # the metric that says what is paid where nothing is observed on held-out samples
_SHOWN = ("predicted", "checked", "realised")  # of parts and of the cost


def headline(
    config: Config, solution: Mapping[str, Any], windows: Mapping[str, Any], arms: Mapping[str, Any], found: Found
) -> list[dict[str, Any]]:
    """Rows of summary.json; an entry of a row is an estimate, or {"missing": why there is none}.

    Args:
        config: of the run.
        solution: content of weights/solution.json; may be empty.
        windows: content of predict/response.json; may be empty.
        arms: name -> ``weights``, ``strength`` and ``rounds`` of the arms that are retrained.
        found: what was predicted, checked and realised.
    """
    solved = solution.get("arms", {})
    own = {"strength": 1.0, "rounds": 1}
    given = {name: {"weights": name, **own} for name, entry in solved.items() if entry.get("target")} | dict(arms)
    targets = {name: _asked(solved.get(arm["weights"], {})) for name, arm in given.items()}
    aims = dict.fromkeys(name for target in targets.values() for name, value in target.items() if value)
    splits = {o.split: o.name for o in config.sampling.observables if o.kind == "split_loss"}
    cost = splits.get(OVERALL, OVERALL if splits else VALIDATION)
    # A target that no training can be asked for, such as a free energy: what came of everything that can.
    beside = [] if set(aims) & set(splits.values()) else [name for name in splits.values() if name != cost]
    rows = []
    for arm, entry in given.items():
        if entry["weights"] is None:
            continue
        weights, scale = solved.get(entry["weights"], {}), entry["strength"]
        # Arms without a target are controls of those that have one.
        for target in dict.fromkeys([*(targets[arm] or aims), *beside]):
            absent = _absent(config, windows.get("arms", {}).get(arm, {}), arm, entry, arm in arms, target)

            def shown(name: str, arm: str = arm) -> dict[str, Any]:
                return {kind: found[kind][arm][name] for kind in _SHOWN if name in found[kind].get(arm, {})}

            row = {
                kind: found[kind].get(arm, {}).get(target, {"missing": absent[kind]}) for kind in ("solved", *_SHOWN)
            }
            asked = _direction(targets[arm].get(target))
            if asked is None and all("missing" in row[kind] for kind in row):
                continue
            if share := weights.get("effective_sample_share"):
                row["solved"] = row["solved"] | {"share": share_at_strength(share, scale)}
            names = dict.fromkeys(name for kind in _SHOWN for name in found[kind].get(arm, {}))
            rows.append(
                {"arm": arm, "target": target, "asked": asked}
                | row
                | {"parts": {part: shown(part) for part in parts_of(target, names)}}
                | {"cost": {"observable": cost, **shown(cost)}}
            )
    return rows


def _asked(solved: Mapping[str, Any]) -> dict[str, float]:
    """Targets, with the sign of the arm; none where only a direction of chi was followed."""
    target = solved.get("target") or {}
    return target if any(target.values()) else {}


def _direction(value: float | None) -> dict[str, Any] | None:
    return value if value is None else {"value": value, "direction": "up" if value > 0 else "down" if value else "hold"}


def _absent(
    config: Config, window: Mapping[str, Any], arm: str, entry: Mapping[str, Any], trained: bool, target: str
) -> dict[str, str]:
    """Why an arm may have no estimate of its target, by kind."""
    splits = {o.name for o in config.sampling.observables if o.kind == "split_loss"}
    no_loss = None if target in splits else "it is no split loss"
    outside = f"outside the window, no prediction: {window['outside']}" if window.get("outside") else None
    changing = "its weights change on the way" if entry["rounds"] > 1 else None
    untrained = None if trained else "it is not retrained"
    unchecked = f"chains were not run under {entry['weights']} weights at strength {entry['strength']:g}"
    return {
        "solved": changing or "no response of its weights was asked for",
        "predicted": no_loss or outside or untrained or "stage predict was not asked for",
        "checked": changing or ("stage check was not asked for" if config.check is None else unchecked),
        "realised": no_loss or untrained or "there is no plain arm from the same start with a seed in common",
    }
