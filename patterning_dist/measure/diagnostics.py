"""What the chains of one component say of themselves: convergence, LLC, and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from patterning_dist.aggregation.ledger import ChainRecord
from patterning_dist.response.diagnostics import observable_diagnostics
from patterning_dist.response.failure_modes import failure_modes
from patterning_dist.response.llc import TraceMean, llc, trace_mean
from patterning_dist.sampling.lanczos import SpectrumEnds


def chain_diagnostics(
    traces: Mapping[str, np.ndarray],
    observable_names: Sequence[str],
    *,
    records: Sequence[ChainRecord],
    excluded: Mapping[int, str],
    reliability: Mapping[str, np.ndarray],
    inverse_temperature: float,
    num_coordinates: int,
    spectrum: SpectrumEnds | None = None,
    step_size: float | None = None,
) -> dict[str, Any]:
    """Diagnostics of every observable, LLC and temperature with errors, and the failure modes that were found.

    Args:
        traces: loss and observables of the healthy chains, name -> [chain, draw].
        observable_names: rows of chi.
        records: of the healthy chains.
        excluded: chain -> why it is left out.
        reliability: split-half reliabilities of the rows of chi, over single losses (``reliability``) and over means of
            samples (``reliability_samples``), where there are some [observable].
        inverse_temperature: n_beta.
        num_coordinates: free coordinates of the component.
        spectrum: of n_beta H + gamma at w*, where it was taken.
        step_size: eps, where it is the same for all coordinates.
    """
    observables = observable_diagnostics(traces)
    for kind, values in reliability.items():
        for name, value in zip(observable_names, values, strict=True):
            observables[name] |= {kind: value}
    chains = tuple(record.chain for record in records)
    temperatures, biases = _blocks([r.temperatures for r in records]), _blocks([r.step_biases for r in records])
    stiff = _blocks([r.stiff_temperatures for r in records])
    findings = failure_modes(
        traces["loss"],
        inverse_temperature=inverse_temperature,
        num_coordinates=num_coordinates,
        chains=chains,
        rhat={name: observables[name]["rhat"] for name in observable_names},
        reliability={name: observables[name]["reliability"] for name in observable_names},
        excluded=excluded,
        temperatures=temperatures,
        step_biases=biases,
        stiff_temperatures=stiff,
        precisions=None if spectrum is None else (spectrum.smallest, spectrum.largest),
        step_size=step_size,
    )
    return {
        "num_chains": len(chains),
        "excluded": [{"chain": chain, "reason": reason} for chain, reason in excluded.items()],
        "num_coordinates": num_coordinates,
        "observables": observables,
        "llc": estimate(llc(traces["loss"], inverse_temperature)),
        "temperature": _mean(temperatures),
        "temperature_of_chains": {str(c): _mean(row[None]) for c, row in zip(chains, temperatures, strict=False)},
        "temperature_stiff": _mean(stiff),
        "step_bias": _mean(biases),
        "spectrum": spectrum and spectrum._asdict(),
        "findings": [finding._asdict() for finding in findings],
    }


def in_short(diagnostics: Mapping[str, Any]) -> dict[str, float]:
    """What is looked at first, see ``live.Live``: the worst R-hat and effective draws, the best reliability."""
    llc, rows = diagnostics["llc"], diagnostics["observables"].values()
    found = {"llc": llc["value"], "llc_error": llc["standard_error"]}
    for name, key, pick in (("rhat", "rhat", max), ("ess", "ess_bulk", min), ("reliability", "reliability", max)):
        values = [row[key] for row in rows if row.get(key) is not None and np.isfinite(row[key])]
        found |= {name: pick(values)} if values else {}
    return found


def _blocks(means: list[list[float]]) -> np.ndarray:
    """[chain, block]; empty where there are too few steps for an error."""
    return np.array(means) if min(map(len, means), default=0) >= 4 else np.zeros((0, 0))


def _mean(blocks: np.ndarray) -> dict[str, Any] | None:
    return estimate(trace_mean(blocks)) if blocks.size else None


def estimate(mean: TraceMean) -> dict[str, Any]:
    """As diagnostics and summaries have it."""
    return {"value": mean.value, "standard_error": mean.standard_error, "interval": mean.interval()}
