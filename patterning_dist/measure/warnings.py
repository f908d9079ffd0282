"""What a reader should know before believing a run's numbers, each with the knob to turn."""

from __future__ import annotations

from typing import Any

from patterning_dist.config import Config

# Fewer draws than these leave R-hat and the errors themselves uncertain (Vehtari et al., 2021: 100 a chain).
MIN_EFFECTIVE_DRAWS = 100
# Below this more than half of the variance of a row of chi is noise, also in the mean over both halves.
MIN_RELIABILITY = 1 / 3


def find_warnings(diagnostics: dict[str, Any], solution: dict[str, Any], config: Config) -> list[str]:
    """One line a weakness of the chains, the response directions or the retraining.

    Args:
        diagnostics: content of response/diagnostics.json.
        solution: content of weights/solution.json.
        config: of the run.
    """
    found = []
    for component, entry in diagnostics["components"].items():
        found += _chains(component, entry)
    found += _modes(diagnostics)
    found += _directions(solution.get("conjugate_gradients", []), config.response.direction.tolerance)
    if len(config.retrain.seeds) < 3:
        found.append(
            f"{len(config.retrain.seeds)} retraining seed(s): intervals over seeds are very wide or missing; "
            "add retrain.seeds"
        )
    return found


def _chains(component: str, entry: dict[str, Any]) -> list[str]:
    found = [f"{component}: chain {e['chain']} was left out: {e['reason']}" for e in entry["excluded"]]
    # Diverged chains are those left out, which are said with their own reasons.
    remedies = [finding["message"] for finding in entry["findings"] if finding["mode"] != "diverged"]
    draws = min((n["ess_bulk"] for n in entry["observables"].values() if n["ess_bulk"] is not None), default=None)
    if draws is not None and draws < MIN_EFFECTIVE_DRAWS:
        remedies.append(f"as few as {draws:.0f} effective draws of an observable; raise sampling.num_draws")
    return [*found, *([f"{component}: {'. '.join(remedies)}"] if remedies else [])]


def _modes(diagnostics: dict[str, Any]) -> list[str]:
    """Singular vectors of noise look like any others: only the reliability of the rows tells."""
    if "modes" not in diagnostics:
        return []
    observable = diagnostics["modes"]["observable"]
    rows = [diagnostics["components"][c]["observables"][observable] for c in diagnostics["modes"]["components"]]
    reliability = max((r["reliability"] for r in rows if r["reliability"] is not None), default=0.0)
    if reliability >= MIN_RELIABILITY:
        return []
    return [
        f"modes over heads: the split-half reliability of the heads' chi is {reliability:.2f} at best, so the modes "
        "are mostly noise; raise num_draws and num_chains of the heads"
    ]


def _directions(solves: list[dict[str, Any]], tolerance: float) -> list[str]:
    found = []
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
