"""What arms came to beside their differences: ratios, shares of an oracle's effect, what heads carry, times."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from patterning_dist.config import Config
from patterning_dist.config.checkpoints import INITIALISATION
from patterning_dist.response.paired import share_of_effect
from patterning_dist.response.survival import Runs, hazard_ratio, kaplan_meier, log_rank
from patterning_dist.stages.arms import Arm, counterpart, entry, same_training, shared_seeds

ABLATED = ("ablated_gap", "other_ablated_gap")  # metrics of a language task: without the induction head, and others
_IN_LOGS = ("value", "interval", "per_seed")


def add_ratios(compared: dict[str, Any], arms: list[Arm], log_scaled: Collection[str]) -> list[str]:
    """Write ``ratio`` beside the differences of log-scaled metrics, and return warnings of those that have none.

        exp( mean_s log(ours_s / theirs_s) )

    the geometric mean over shared seeds, paired, with the interval of Student's t on the logarithmic scale.

    Args:
        compared: arm -> other -> metric -> difference, see ``contrasts``.
        arms: of the run.
        log_scaled: names of metrics.
    """
    by_name, warnings = {arm.name: arm for arm in arms}, []
    for one, against in compared.items():
        for other, found in against.items():
            ours, theirs = by_name[one].metrics, by_name[other].metrics
            _, (first, second) = shared_seeds(by_name[one], by_name[other])
            for metric in (name for name in log_scaled if name in ours and name in theirs):
                effects = _effects(ours[metric][first], theirs[metric][second], in_logs=True)
                if effects is None:
                    warnings.append(
                        f"{one} and {other}: {metric} is compared by differences alone, since it is 0 or below in some "
                        "of the trainings and has no ratio there"
                    )
                    continue
                logs = entry(effects)
                powers = {key: None if logs[key] is None else np.exp(logs[key]).tolist() for key in _IN_LOGS}
                found[metric]["ratio"] = logs | powers
    return warnings


def oracle_shares(config: Config, arms: list[Arm], log_scaled: Collection[str]) -> dict[str, Any]:
    """Oracle -> arm -> metric or observable -> the arm's effect over the oracle's, on the seeds that both share.

    An oracle is an arm on the weights of a control of kind ``split``, and arms of its strength are held against it;
    effects are differences from the plain arm of the same start, of log-scaled metrics differences of logarithms.
    """
    splits = [control.name for control in (config.solve.controls if config.solve else []) if control.kind == "split"]
    found: dict[str, Any] = {}
    for oracle in (arm for arm in arms if arm.settings.weights in splits):
        if (base := counterpart(oracle, arms, None)) is None:
            continue
        for arm in arms:
            if arm is oracle or arm.settings.weights is None or not same_training(arm, oracle):
                continue
            if arm.settings.strength != oracle.settings.strength:  # weights of another share
                continue
            if shares := dict(_shares(arm, oracle, base, log_scaled)):
                found.setdefault(oracle.name, {})[arm.name] = shares
    return found


def _shares(arm: Arm, oracle: Arm, base: Arm, log_scaled: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    seeds, places = shared_seeds(arm, oracle, base)
    three = list(zip((arm, oracle, base), places, strict=True))
    for kind in ("metrics", "observables") if seeds else ():
        for name in getattr(arm, kind):
            if not all(name in getattr(one, kind) for one, _ in three):
                continue
            ours, theirs, plain = (getattr(one, kind)[name][at] for one, at in three)
            in_logs = kind == "metrics" and name in log_scaled
            effects, reference = (_effects(values, plain, in_logs) for values in (ours, theirs))
            if effects is not None and reference is not None:
                share, interval = share_of_effect(effects, reference)
                yield name, {"value": share, "interval": interval, "covers": ["seeds"], "seeds": seeds}


def _effects(ours: np.ndarray, theirs: np.ndarray, in_logs: bool) -> np.ndarray | None:
    """Differences of values or of their logarithms [seed]; None where one has no logarithm."""
    if not in_logs:
        return ours - theirs
    return np.log(ours / theirs) if (ours > 0).all() and (theirs > 0).all() else None


def head_ablations(arms: list[Arm]) -> dict[str, Any]:
    """Arm -> how far the repeated-sequence gap rises where a head of the trained networks is ablated, nats.

        rise_s(h) = gap_s(without h) - gap_s

    of every seed s: ``induction_head``, of the largest prefix-matching score; ``other_heads``, the mean over others of
    its layer; and ``difference``, paired by seed. Arms whose heads are not known are left out.
    """
    found = {}
    for arm in arms:
        if not {"repeated_gap", *ABLATED} <= arm.metrics.keys():
            continue
        own, other = (arm.metrics[name] - arm.metrics["repeated_gap"] for name in ABLATED)
        rises = {"induction_head": own, "other_heads": other, "difference": own - other}
        found[arm.name] = {name: entry(values) for name, values in rises.items()}
    return found


def time_to_event(arms: list[Arm]) -> dict[str, Any]:
    """Arm -> how many runs formed an induction head and when, and its weights against none and against permuted ones.

    The event is the first evaluation with a prefix-matching score above the threshold; a run without it is censored at
    its last step. Only runs from initialisation are waited for: a checkpoint may have the head already.
    """
    found = {}
    fresh = [arm for arm in arms if arm.settings.start == INITIALISATION]
    scored = {arm.name: _runs(arm) for arm in fresh if arm.transitions is not None}
    for arm in (arm for arm in arms if arm.name in scored):
        runs = scored[arm.name]
        curve = kaplan_meier(runs)
        others = [counterpart(arm, arms, weights) for weights in (None, "permuted") if arm.settings.weights is not None]
        found[arm.name] = {
            "runs": len(runs.times),
            "events": int(runs.happened.sum()),
            "median": curve.median,
            "median_interval": curve.median_interval,
            "censored_at": runs.times[~runs.happened],
            "not_reached": curve._asdict(),
            "against": {
                other.name: log_rank(runs, scored[other.name])._asdict()
                | {"hazard_ratio": hazard_ratio(runs, scored[other.name])._asdict()}
                for other in others
                if other is not None and other is not arm and other.name in scored
            },
        }
    return found


def _runs(arm: Arm) -> Runs:
    steps = [last if step is None else step for step, last in zip(arm.transitions or (), arm.last_steps, strict=True)]
    return Runs(np.array(steps, dtype=np.float64), np.array([step is not None for step in arm.transitions or ()]))
