"""What the healthy chains of one subject say, read back from its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from patterning_dist.aggregation.files import read_records, read_traces
from patterning_dist.storage.files import read_parquet
from patterning_dist.storage.run import RunDirectory


@dataclass(frozen=True)
class SubjectResponse:
    """chi, errors and diagnostics of a subject.

    Attributes:
        name: of the subject.
        rows: names of the rows of ``chi``: observables, then the quantities of the posterior as a whole.
        chi: of the probe's single losses [row, entry].
        standard_error: of chi, likewise.
        rhat: split R-hat of these losses [entry].
        center_losses: l_i(w*) [entry], nats.
        traces: loss and observables, name -> [chain, draw].
        chains: numbers of the chains in the traces.
        diagnostics: see ``chain_diagnostics``.
    """

    name: str
    rows: list[str]
    chi: np.ndarray
    standard_error: np.ndarray
    rhat: np.ndarray
    center_losses: np.ndarray
    traces: dict[str, np.ndarray]
    chains: tuple[int, ...]
    diagnostics: dict[str, Any]


def table_name(subject: str) -> str:
    """Table of chi of the probe's single losses, relative to the run directory; a folder of parts."""
    folder, _, component = subject.rpartition("/")
    return f"response/{folder}{'/' if folder else ''}susceptibility-{component}.parquet"


def samples_table_name(subject: str) -> str:
    """Likewise of the means of samples that have several losses."""
    return table_name(subject).removesuffix(".parquet") + "-samples.parquet"


def read_response(run: RunDirectory, subject: str, rows: list[str], diagnostics: dict[str, Any]) -> SubjectResponse:
    """The response of a finished subject from its files."""
    columns = ["rhat", "center_loss", *(f"{kind}_{name}" for kind in ("chi", "se") for name in rows)]
    table, _ = read_parquet(run.path / table_name(subject), columns)
    values = {name: table[name].to_numpy() for name in columns}
    folder = run.path / "sampling" / subject
    excluded = {entry["chain"] for entry in diagnostics["excluded"]}
    chains = tuple(record.chain for record in read_records(folder) if record.chain not in excluded)
    return SubjectResponse(
        name=subject,
        rows=rows,
        chi=np.stack([values[f"chi_{name}"] for name in rows]),
        standard_error=np.stack([values[f"se_{name}"] for name in rows]),
        rhat=values["rhat"],
        center_losses=values["center_loss"],
        traces=read_traces(folder, chains),
        chains=chains,
        diagnostics=diagnostics,
    )
