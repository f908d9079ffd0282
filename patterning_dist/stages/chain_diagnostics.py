"""What the chains of one component say of themselves: convergence, LLC, and what went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from patterning_dist.response.diagnostics import observable_diagnostics
from patterning_dist.response.failure_modes import failure_modes
from patterning_dist.response.llc import llc
from patterning_dist.response.reliability import split_half_reliability
from patterning_dist.response.susceptibility import Susceptibility


def read_traces(folder: Path, chains: Sequence[int]) -> dict[str, np.ndarray]:
    """Traces of the loss and the observables, name -> [chain, draw], of the chains named."""
    table = pq.read_table(folder / "traces.parquet")
    chain_of_row = table["chain"].to_numpy()
    return {
        name: np.stack([table[name].to_numpy()[chain_of_row == chain] for chain in chains])
        for name in table.column_names
        if name not in ("chain", "draw")
    }


def chain_diagnostics(
    folder: Path,
    observable_names: Sequence[str],
    measured: Susceptibility,
    *,
    num_entries: int,
    inverse_temperature: float,
    num_coordinates: int,
) -> dict[str, Any]:
    """Diagnostics of every observable, the LLC with its error, and the failure modes that were found.

    Args:
        folder: of the component under ``sampling/``.
        observable_names: rows of chi.
        measured: chi of the component.
        num_entries: probe columns that are single losses; those after them are means of samples.
        inverse_temperature: n_beta.
        num_coordinates: free coordinates of the component.
    """
    traces = read_traces(folder, measured.chains)
    observables = observable_diagnostics(traces)
    entries = split_half_reliability(measured.chi_per_chain[:, :, :num_entries])
    for k, name in enumerate(observable_names):
        observables[name] |= {"reliability": entries[k]}
    if measured.chi.shape[1] > num_entries:
        sequences = split_half_reliability(measured.chi_per_chain[:, :, num_entries:])
        for k, name in enumerate(observable_names):
            observables[name] |= {"reliability_sequences": sequences[k]}
    coefficient = llc(traces["loss"], inverse_temperature)
    findings = failure_modes(
        traces["loss"],
        inverse_temperature=inverse_temperature,
        num_coordinates=num_coordinates,
        chains=measured.chains,
        rhat={name: observables[name]["rhat"] for name in observable_names},
        reliability={name: observables[name]["reliability"] for name in observable_names},
        excluded=measured.excluded,
    )
    return {
        "num_chains": len(measured.chains),
        "excluded": [{"chain": chain, "reason": reason} for chain, reason in measured.excluded.items()],
        "num_coordinates": num_coordinates,
        "observables": observables,
        "llc": {
            "value": coefficient.value,
            "standard_error": coefficient.standard_error,
            "interval": coefficient.interval(),
        },
        "findings": [finding._asdict() for finding in findings],
    }
