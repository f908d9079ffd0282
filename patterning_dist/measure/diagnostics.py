"""What the chains of one component say of themselves: convergence, LLC, and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from patterning_dist.response.diagnostics import observable_diagnostics
from patterning_dist.response.failure_modes import failure_modes
from patterning_dist.response.llc import llc


def chain_diagnostics(
    traces: Mapping[str, np.ndarray],
    observable_names: Sequence[str],
    *,
    chains: Sequence[int],
    excluded: Mapping[int, str],
    reliability: Mapping[str, np.ndarray],
    inverse_temperature: float,
    num_coordinates: int,
) -> dict[str, Any]:
    """Diagnostics of every observable, the LLC with its error, and the failure modes that were found.

    Args:
        traces: loss and observables of the healthy chains, name -> [chain, draw].
        observable_names: rows of chi.
        chains: numbers of the healthy chains.
        excluded: chain -> why it is left out.
        reliability: split-half reliabilities of the rows of chi, over single losses (``reliability``) and over means of
            samples (``reliability_samples``), where there are some [observable].
        inverse_temperature: n_beta.
        num_coordinates: free coordinates of the component.
    """
    observables = observable_diagnostics(traces)
    for kind, values in reliability.items():
        for name, value in zip(observable_names, values, strict=True):
            observables[name] |= {kind: value}
    coefficient = llc(traces["loss"], inverse_temperature)
    findings = failure_modes(
        traces["loss"],
        inverse_temperature=inverse_temperature,
        num_coordinates=num_coordinates,
        chains=tuple(chains),
        rhat={name: observables[name]["rhat"] for name in observable_names},
        reliability={name: observables[name]["reliability"] for name in observable_names},
        excluded=excluded,
    )
    return {
        "num_chains": len(chains),
        "excluded": [{"chain": chain, "reason": reason} for chain, reason in excluded.items()],
        "num_coordinates": num_coordinates,
        "observables": observables,
        "llc": {
            "value": coefficient.value,
            "standard_error": coefficient.standard_error,
            "interval": coefficient.interval(),
        },
        "findings": [finding._asdict() for finding in findings],
    }
