"""The strength that a cost allows: solved weights are scaled down until their window costs no more than was asked.

rho = 1 + s h, s in (0, 1], keeps bounds, masses of groups and the direction of the response, which is s times as large.
The cost is the upper end of the 95 % interval of what ``stages.windows`` predicts of the overall loss against equal
weights, where the retrainings' window leads: first order in s by what h asks of that loss and by the errors, second by
all else.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from patterning_dist.config import Config
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.stages.windows import num_trained, plain_subject, predicted_change, walk_subjects, window_of
from patterning_dist.storage.run import RunDirectory

_FIRST, _MORE = (1.0, 0.5, 0.25), 3  # strengths that are walked at once, and how many may come one after another
MAX_WALKS = len(_FIRST) + _MORE  # of every table
_CLOSE, _AIM = 0.9, 0.95  # shares of the largest cost: from where one will do, and what is looked for
_SCALED = ("value", "standard_error", "interval")


def hold_cost(
    config: Config, run: RunDirectory, tables: dict[str, str], progress: Progress
) -> dict[str, dict[str, Any]]:
    """The largest strength found at which each table costs no more than ``solve.max_cost``, errors included.

    Args:
        config: with solve.max_cost.
        run: holds the tables and the walks.
        tables: arm -> its table at strength 1, relative to the run directory.
        progress: hears what is found.

    Returns:
        Arm -> ``scale`` s, ``max_cost``, the predicted ``overall`` loss there, and all that was ``tried``: s and the
        upper end of the interval there [nats], null where the window has no prediction.

    Raises:
        PatterningError: no strength that was tried stays within the cost.
    """
    assert config.solve is not None and config.solve.max_cost is not None and config.retrain is not None
    largest, observable = config.solve.max_cost, overall_observable(config)
    assert observable is not None
    lead = next(arm for arm in config.retrain.arm_list if isinstance(arm.weights, str))
    (name, plain), window, seen = plain_subject(config, lead), window_of(config, lead), num_trained(config, lead)
    tried = {arm: dict[float, Any]() for arm in tables}
    wanted = [(arm, s) for arm in tables for s in _FIRST]
    for _ in range(1 + _MORE):
        subjects = {f"predict/cost/{arm}@{s:.6f}": replace(plain, weights=tables[arm], strength=s) for arm, s in wanted}
        windows = dict.fromkeys((name, *subjects), window)
        here, walks = walk_subjects(config, run, {name: plain} | subjects, windows, progress)
        for (arm, s), subject in zip(wanted, subjects, strict=True):
            entry = predicted_change(here, window, walks[subject], walks[name], seen)
            tried[arm][s] = entry.get("observables", {}).get(observable)
        scales = {arm: next_scale({s: _cost(e) for s, e in entries.items()}, largest) for arm, entries in tried.items()}
        wanted = [(arm, s) for arm, s in scales.items() if s is not None]
        if not wanted:
            break
    found = {}
    for arm, entries in tried.items():
        allowed = [s for s, e in entries.items() if _cost(e) <= largest]
        if not allowed:
            costs = ", ".join(f"{_cost(e):.3g} at {s:.3g}" for s, e in entries.items() if e) or "no prediction"
            raise PatterningError(
                f"solve.max_cost: the upper end of what {arm} is predicted to cost is more than {largest:g} nats at "
                f"every strength tried ({costs}, of the solved one); raise it, lower solve.strength, or raise "
                "sampling.evaluation_sequences for narrower intervals"
            )
        s = max(allowed)
        values = [[t, None if e is None else _cost(e)] for t, e in sorted(entries.items())]
        found[arm] = {"scale": s, "max_cost": largest, "overall": entries[s], "tried": values}
        words = f"{entries[s]['value']:.3g} nats, at most {_cost(entries[s]):.3g}"
        progress.say(f"solve: {arm} at {s:.3g} of its strength is predicted to cost {words}")
    return found


def overall_observable(config: Config) -> str | None:
    """The observable that is the overall held-out loss."""
    losses = (o for o in config.sampling.observables if o.kind == "split_loss" and o.split == "overall")
    return next((o.name for o in losses), None)


def _cost(entry: dict[str, Any] | None) -> float:
    return math.inf if entry is None else float(entry["interval"][1])


def next_scale(costs: dict[float, float], largest: float) -> float | None:
    """Where to look next, given costs at scales up to 1; None: there is no need to look any further.

    Between the largest scale that is allowed and the smallest that is not, a s + b s^2 through the two scales nearest
    to the crossing is solved for a cost a little below the largest.
    """
    low = max((s for s, c in costs.items() if c <= largest), default=0.0)
    above = sorted(s for s, c in costs.items() if c > largest and s > low)
    if not above or (low and costs[low] >= _CLOSE * largest):
        return None
    high = above[0]
    near = [s for s in (low, *above) if s and math.isfinite(costs[s])][:2]
    if len(near) < 2:
        return (low + high) / 2
    slope, bend = np.linalg.solve([[s, s**2] for s in near], [costs[s] for s in near])
    roots = np.roots([bend, slope, -_AIM * largest])
    inside = [float(r.real) for r in roots if abs(r.imag) < 1e-9 and low < r.real < high]
    margin = 0.05 * (high - low)
    return float(np.clip(min(inside, default=(low + high) / 2), low + margin, high - margin))


def scale_arm(weights: np.ndarray, entry: dict[str, Any], cost: dict[str, Any]) -> np.ndarray:
    """Weights at the strength found; their entry of solution.json is changed to be of them."""
    s = cost["scale"]
    scaled = 1 + s * (weights - 1)
    for kind in ("predicted_response", "cross_fitted_response"):
        for response in entry[kind].values():
            response |= {key: s * np.asarray(response[key]) for key in _SCALED}
    edges = entry["histogram"]["edges"]
    heaviest = np.sort(scaled)[-math.ceil(len(scaled) / 100) :]
    size = scaled.sum() ** 2 / (scaled**2).sum()
    entry |= {
        "cost": cost,
        "strength": s * entry["strength"],
        "histogram": {"edges": edges, "counts": np.histogram(scaled, edges)[0]},
        "effective_sample_size": size,
        "effective_sample_share": size / len(scaled),
        "top_percent_share": heaviest.sum() / scaled.sum(),
    }
    if s < 1:
        entry |= {"num_at_minimum": 0, "num_at_maximum": 0}
    return scaled
