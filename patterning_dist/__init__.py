"""Susceptibilities of a network to its training data, and data weights that steer its training.

The names below are loaded when they are first used, so that ``import patterning_dist`` needs neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import Any

# name -> where it is
_MODULES = {
    "ChainWarning": "response.judged",
    "CoMoments": "response.moments",
    "Config": "config",
    "PatterningError": "errors",
    "Posterior": "sampling.posterior",
    "Susceptibility": "response.susceptibility",
    "WeightSolution": "response.solver",
    "cross_fitted_response": "response.prediction",
    "free_energy_response": "response.judged",
    "largest_feasible_strength": "response.solver",
    "llc": "response.judged",
    "llc_response": "response.judged",
    "load_config": "config",
    "open_run": "opened",
    "predicted_response_with_error": "response.prediction",
    "run_stages": "driver",
    "sample_chains": "sampling.sample",
    "solve_for_effective_sample_share": "response.judged",
    "solve_weights": "response.judged",
    "split_half_reliability": "response.reliability",
    "split_rhat": "response.diagnostics",
    "step_extrapolated": "response.step_extrapolation",
    "susceptibility": "response.judged",
    "susceptibility_modes": "response.modes",
    "trace_mean": "response.llc",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("patterning-dist")
    elif name in _MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
