"""What the aggregator holds of every chain: its co-moments, its traces of observables, and which push comes next.

Plain Python, so that a study without Ray and the aggregator actor are the same arithmetic.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from patterning_dist.files import write_json, write_npz, write_parquet
from patterning_dist.response.diagnostics import healthy_chains
from patterning_dist.response.moments import CoMoments

Answer = Literal["applied", "duplicate"]


@dataclass
class ChainRecord:
    """One chain: how it ended, and how long it took.

    ``seconds`` is the chain's own wall time; ``reason`` says why an unhealthy chain is left out.
    """

    chain: int
    healthy: bool = True
    reason: str = ""
    draws: int = 0
    steps: int = 0
    seconds: float = 0.0


@dataclass
class _Chain:
    moments: CoMoments
    record: ChainRecord
    next_sequence: int = 0
    traces: list[np.ndarray] = field(default_factory=list)  # each [draw, 1 + observable]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


class Ledger:
    """Statistics of all chains of one component. Memory is O(chains * batches * observables * probe columns).

    Args:
        observables: names, in the order of the pushes.
        num_columns: probe columns (tokens, then sequences).
        num_draws: planned draws of a chain.
        num_batches: batches of consecutive draws, for batch means.
    """

    def __init__(self, observables: list[str], num_columns: int, num_draws: int, num_batches: int) -> None:
        self.observables, self.num_columns = observables, num_columns
        self.num_draws, self.num_batches = num_draws, num_batches
        self._chains: dict[int, _Chain] = {}

    @property
    def num_recorded(self) -> int:
        """Draws taken in so far, of all chains."""
        return sum(entry.moments.num_recorded for entry in self._chains.values())

    def open(self, chain: int) -> None:
        """Begin a chain, or begin it again from its first draw: what an earlier attempt left is dropped."""
        moments = CoMoments.empty(chain, self.num_draws, len(self.observables), self.num_columns, self.num_batches)
        self._chains[chain] = _Chain(moments, ChainRecord(chain))

    def push(
        self,
        chain: int,
        sequence_number: int,
        observables: np.ndarray,
        losses: np.ndarray,
        mean_losses: np.ndarray,
    ) -> Answer:
        """Take in consecutive draws, once: a push that was taken in before is answered ``duplicate``.

        Args:
            chain: a chain that was opened.
            sequence_number: of the push, counted from 0 by the chain.
            observables: [draw, observable] deviations from the centre.
            losses: [draw, probe column] deviations from the centre, nats.
            mean_losses: [draw] L(w) - L(w*), nats.

        Raises:
            ValueError: a push is missing before this one.
        """
        entry = self._chains[chain]
        if sequence_number < entry.next_sequence:
            return "duplicate"
        if sequence_number > entry.next_sequence:
            raise ValueError(f"chain {chain}: push {sequence_number} came before push {entry.next_sequence}")
        entry.moments.update(observables, losses)
        entry.traces.append(np.column_stack([mean_losses, observables]))
        entry.record.draws += len(observables)
        entry.next_sequence += 1
        return "applied"

    def close(self, record: ChainRecord, arrays: dict[str, np.ndarray]) -> None:
        """Note how a chain ended; ``arrays`` (centre losses, gradient sums) are kept with it."""
        entry = self._chains[record.chain]
        record.draws = entry.record.draws
        entry.record, entry.arrays = record, arrays

    def write(self, folder: Path) -> None:
        """Write moments.npz, traces.parquet, arrays.npz and chains.json, healthy and unhealthy chains alike."""
        entries = [self._chains[chain] for chain in sorted(self._chains)]
        moments = {f"{e.record.chain}/{k}": v for e in entries for k, v in e.moments.state_dict().items()}
        write_npz(folder / "moments.npz", moments)
        columns: dict[str, list] = {name: [] for name in ("chain", "draw", "loss", *self.observables)}
        for entry in entries:
            rows = np.concatenate([*entry.traces, np.zeros((0, 1 + len(self.observables)))])
            columns["chain"].append(np.full(len(rows), entry.record.chain, np.int32))
            columns["draw"].append(np.arange(len(rows), dtype=np.int32))
            for name, column in zip(("loss", *self.observables), rows.T, strict=True):
                columns[name].append(column)
        write_parquet(folder / "traces.parquet", pa.table({k: np.concatenate(v) for k, v in columns.items()}))
        write_npz(folder / "arrays.npz", {f"{e.record.chain}/{k}": v for e in entries for k, v in e.arrays.items()})
        write_json(folder / "chains.json", [asdict(e.record) for e in entries])


def read_chains(folder: Path) -> tuple[list[CoMoments], dict[int, str]]:
    """Co-moments of the healthy chains of a component, and the others as chain -> reason.

    What a chain says of itself is checked: one that lacks draws, or whose moments are not finite, is left out as well.
    """
    records = json.loads((folder / "chains.json").read_text())
    with np.load(folder / "moments.npz") as stored:
        claimed = [
            CoMoments.from_state_dict(
                {k.split("/", 1)[1]: stored[k] for k in stored.files if k.startswith(f"{r['chain']}/")}
            )
            for r in records
            if r["healthy"]
        ]
    healthy, excluded = healthy_chains(claimed)
    return healthy, {r["chain"]: r["reason"] for r in records if not r["healthy"]} | excluded
