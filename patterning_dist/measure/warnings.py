"""What a reader should know before believing a run's numbers, each with the knob to turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from patterning_dist.config import Config
from patterning_dist.response.reliability import MOSTLY_SIGNAL

# Fewer draws than these leave R-hat and the errors themselves uncertain (Vehtari et al., 2021: 100 a chain).
MIN_EFFECTIVE_DRAWS = 100


def find_warnings(
    diagnostics: Mapping[str, Any],
    solution: Mapping[str, Any],
    checked: Mapping[str, Any],
    config: Config,
    rounds: Iterable[Mapping[str, Any]] = (),
) -> list[str]:
    """One line a weakness of the chains, the modes, the response directions, the prediction or the retraining.

    Args:
        diagnostics: content of response/diagnostics.json.
        solution: content of weights/solution.json; empty where nothing is solved.
        checked: content of check/response.json; empty where nothing is checked.
        config: of the run.
        rounds: contents of retrain/<arm>/seed-<s>/round-<r>/solution.json.
    """
    found = [line for subject, entry in diagnostics["subjects"].items() for line in _chains(subject, entry)]
    for modes in diagnostics["modes"].values():
        found += _modes(diagnostics["subjects"], modes)
    if config.response.direction is not None:
        solves = [solve for entry in (solution, *rounds) for solve in entry.get("conjugate_gradients", [])]
        found += _directions(solves, config.response.direction.tolerance)
    for key, what in (("estimator_agreement", "response direction"), ("control_agreement", "linear control's")):
        found += _scale(solution.get(key) or {}, what)
    if checked:
        found += _nonlinear(checked["strengths"], solution["arms"][checked["weights"]]["predicted_response"])
    if config.retrain is not None:
        found += _seeds({arm.name: arm.seeds or [] for arm in config.retrain.arm_list})
    return found


def _chains(subject: str, entry: Mapping[str, Any]) -> list[str]:
    """Chains that were left out or whose draws do not bear their numbers."""
    found = [f"{subject}: chain {e['chain']} was left out: {e['reason']}" for e in entry["excluded"]]
    # Diverged chains are those left out, which are said with their own reasons.
    remedies = [finding["message"] for finding in entry["findings"] if finding["mode"] != "diverged"]
    draws = min((n["ess_bulk"] for n in entry["observables"].values() if n["ess_bulk"] is not None), default=None)
    if draws is not None and draws < MIN_EFFECTIVE_DRAWS:
        remedies.append(f"as few as {draws:.0f} effective draws of an observable; raise sampling.num_draws")
    biased = [
        f"{name} by {2 * one['bias']['value']:.2g} ({abs(one['bias_ratio']):.1f} standard errors)"
        for name, one in entry.get("extrapolated", {}).items()
        if one.get("is_biased")
    ]
    if biased:
        text = f"the step size puts off {', '.join(biased)}"
        remedies.append(f"{text}; take the answers at step size 0 or lower sampling.step_size")
    return [*found, *([f"{subject}: {'. '.join(remedies)}"] if remedies else [])]


def _modes(subjects: Mapping[str, Any], modes: Mapping[str, Any]) -> list[str]:
    """Singular vectors of noise look like any others: only the reliability of the rows tells."""
    rows = [subjects[subject]["observables"][modes["observable"]] for subject in modes["components"]]
    reliability = max((r["reliability"] for r in rows if r["reliability"] is not None), default=0.0)
    if reliability >= MOSTLY_SIGNAL:
        return []
    return [
        f"modes over heads: the split-half reliability of the heads' chi is {reliability:.2f} at best, so the modes "
        "are mostly noise; raise num_draws and num_chains of the heads"
    ]


def _directions(solves: Iterable[Mapping[str, Any]], tolerance: float) -> list[str]:
    found, solves = [], list(solves)
    negative = [solve for solve in solves if solve["negative_curvature"]]
    if negative:
        found.append(
            f"the loss curves downwards in {len(negative)} of {len(solves)} response-direction solves, which stopped "
            "early; raise sampling.localization or lower inverse_temperature"
        )
    residuals = [s["relative_residual"] for s in solves if not s["negative_curvature"]]
    loose = [residual for residual in residuals if residual > tolerance]
    if loose:
        found.append(
            f"{len(loose)} of {len(solves)} response-direction solves stopped at a relative residual up to "
            f"{max(loose):.2g}, wanted {tolerance:g}; raise response.direction.conjugate_gradient_iterations"
        )
    return found


def _scale(agreement: Mapping[str, Mapping[str, Any]], what: str) -> list[str]:
    """Observables whose plain covariance, noisy but without bias, is of another size than an estimate for Gaussians."""
    found = []
    for name, entry in agreement.items():
        level = "samples" if "slope_samples" in entry else "entries"
        slope, ends = entry.get(f"slope_{level}"), entry.get(f"slope_interval_{level}") or [None, None]
        if slope is not None and None not in ends and not ends[0] <= 1 <= ends[1]:
            found.append(
                f"{name}: the plain covariance is {slope:.2f} [{ends[0]:.2f}, {ends[1]:.2f}] times the {what} "
                "on the probe, so predictions are off in size by as much (their order is not); raise "
                "sampling.localization, or believe stage check"
            )
    return found


def _nonlinear(strengths: Mapping[str, Any], linear: Mapping[str, Any]) -> list[str]:
    """Observables whose measured response the linear one misses by more than the 95 % intervals of both."""
    found = []
    for strength, entries in strengths.items():
        missed = [
            f"{name} ({entry['predicted']:.3g} predicted, {entry['value']:.3g} measured)"
            for name, entry in entries.items()
            if name in linear
            and (entry["value"] - entry["predicted"]) ** 2
            > (np.ptp(entry["interval"]) / 2) ** 2 + (1.96 * float(strength) * linear[name]["standard_error"]) ** 2
        ]
        if missed:
            found.append(
                f"check at strength {strength}: the chains under the weights do not respond as predicted in "
                f"{', '.join(missed)}; lower solve.strength, or raise solve.effective_sample_share"
            )
    return found


def _seeds(arms: Mapping[str, list[int]]) -> list[str]:
    few = [name for name, seeds in arms.items() if len(seeds) < 3]
    if not few:
        return []
    return [
        f"{min(len(arms[name]) for name in few)} retraining seed(s) of {', '.join(few)}: intervals over seeds are very "
        "wide or missing; add retrain.seeds"
    ]
