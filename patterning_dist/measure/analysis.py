"""What every aggregator shard makes of its part of a subject: rows of the susceptibility tables, sums for the driver.

The driver never holds [observable, probe column] of a subject: it adds up what the shards return.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.aggregation.files import read_controlled
from patterning_dist.aggregation.ledger import Ledger, LedgerPlan, Part
from patterning_dist.heartbeat import beat
from patterning_dist.response.diagnostics import split_rhat
from patterning_dist.response.llc import free_energy_response, llc_response
from patterning_dist.response.reliability import split_half_sums
from patterning_dist.response.susceptibility import Baseline, Susceptibility, susceptibility
from patterning_dist.storage.files import parquet_bytes
from patterning_dist.storage.store import Storage

SIGN = "chi = -Cov(phi, l_i - L): negative means that weighting sample i up lowers phi"
UNITS = "chi and se: nats times the unit of the observable; center_loss: nats"
STANDARD_ERROR = "the larger of batch means inside chains and the spread between chains"


@dataclass(frozen=True)
class TablePlan:
    """One table: a contiguous range of probe columns, a row each.

    Attributes:
        name: of the folder of Parquet files, relative to the run directory; every shard writes one.
        start: of the first probe column.
        index: what the rows are of, name -> [row].
    """

    name: str
    start: int
    index: Mapping[str, np.ndarray]

    @property
    def stop(self) -> int:
        return self.start + len(next(iter(self.index.values())))


@dataclass(frozen=True)
class PartSummary:
    """What the driver hears of a part.

    Attributes:
        chains: numbers of the healthy chains.
        excluded: chain -> why it is left out.
        reliability: sums for ``reliability_from_sums``, of every table; observables, then controlled ones.
        files: tables written, relative to the run directory.
    """

    chains: tuple[int, ...]
    excluded: dict[int, str]
    reliability: list[np.ndarray]
    files: list[str]


@dataclass(frozen=True)
class Analysis:
    """chi of every observable with errors, as tables; called in the shards.

    Attributes:
        storage: of the run.
        subject: whose chains they are.
        observables: names of the rows of the co-moments.
        tables: single losses first, then means of samples where there are some.
        metadata: for the headers of the tables.
        min_chains: healthy chains without which this is an error.
        baseline: of ``susceptibility``; for ``full``, ``full`` is the plan of the subject ``everything``.
        llc, free_energy: names of rows to be added, the responses of these quantities.
        controlled: likewise, of observables that are measured with a control besides.
        inverse_temperature: n_beta.
    """

    storage: Storage
    subject: str
    observables: Sequence[str]
    tables: Sequence[TablePlan]
    metadata: Mapping[str, Any]
    min_chains: int
    inverse_temperature: float
    baseline: Baseline = "restricted"
    full: LedgerPlan | None = None
    llc: Sequence[str] = ()
    free_energy: Sequence[str] = ()
    controlled: Sequence[str] = ()

    def __call__(self, part: Part) -> PartSummary:
        """Write this part's rows of every table.

        Raises:
            PatterningError: too few healthy chains, or no space on the disk.
        """
        common: dict[str, Any] = {
            "loss_weights": part.loss_weights,
            "min_chains": self.min_chains,
            "excluded": part.excluded,
        }
        measured = susceptibility(part.chains, baseline=self.baseline, full=self._full(part), **common)
        rows = dict(zip(self.observables, _rows(measured), strict=True))
        beat()
        for name in self.llc:
            beat()
            # Component losses are the first rows.
            (rows[name],) = _rows(llc_response(part.chains, 0, self.inverse_temperature, **common))
        for name in self.free_energy:
            (rows[name],) = _rows(free_energy_response(part.chains, part.center_losses, **common))
        per_chain = measured.chi_per_chain
        if self.controlled:
            kept = np.append(np.arange(part.columns.start, part.columns.stop), -1)
            controlled = read_controlled(self.storage, self.subject, [m.chain for m in part.chains], kept)
            found = susceptibility(controlled, **common)
            rows |= zip(self.controlled, _rows(found), strict=True)
            per_chain = np.concatenate([per_chain, found.chi_per_chain], axis=1)
        beat()
        rhat = split_rhat(part.chains)
        counts = {"num_chains": len(part.chains), "num_draws": part.chains[0].num_recorded}
        metadata = dict(self.metadata) | {"baseline": measured.baseline} | counts
        reliability, files = [], []
        for table in self.tables:
            beat()
            first, last = max(table.start, part.columns.start), min(table.stop, part.columns.stop)
            here = slice(first - part.columns.start, max(last, first) - part.columns.start)
            reliability.append(split_half_sums(per_chain[:, :, here]))
            if last <= first:
                continue
            columns = {name: values[first - table.start : last - table.start] for name, values in table.index.items()}
            columns["center_loss"] = part.center_losses[here].astype(np.float32)
            columns["rhat"] = rhat[here].astype(np.float32)
            for name, (chi, error) in rows.items():
                columns[f"chi_{name}"] = chi[here].astype(np.float32)
                columns[f"se_{name}"] = error[here].astype(np.float32)
            files.append(f"{table.name}/part-{part.shard:05d}.parquet")
            self.storage.write(files[-1], parquet_bytes(pa.table(columns), metadata))
        return PartSummary(measured.chains, part.excluded, reliability, files)

    def _full(self, part: Part) -> list | None:
        if self.baseline != "full":
            return None
        if self.full is None:  # this is the subject of the whole model
            return part.chains
        checkpoint, slash, _ = self.subject.rpartition("/")
        name = f"{checkpoint}{slash}everything"
        return Ledger(self.full, part.shard, part.num_shards, self.storage, name).part().chains


def _rows(measured: Susceptibility) -> list[tuple[np.ndarray, np.ndarray]]:
    """chi and standard error of every row."""
    return list(zip(measured.chi, measured.standard_error, strict=True))
