"""The files of a subject, a set of chains on one component, once its chains are through.

shard-<s>/chain-<n>.*   statistics of the probe columns of one shard: see ``Ledger.snapshot``
gradients/chain-<n>.*   sums of positions and gradients over the draws, where they were taken
traces.parquet          mean loss and observables of every draw
chains.json             how every chain ended
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from patterning_dist.aggregation.ledger import ChainRecord, stored_moments
from patterning_dist.errors import PatterningError
from patterning_dist.response.moments import CoMoments, healthy_chains
from patterning_dist.storage.files import read_parquet, write_json, write_parquet
from patterning_dist.storage.snapshots import Snapshots, unpack
from patterning_dist.storage.store import LocalStorage, Storage

# Folders of what statistics of a chain come to: means of positions and gradients, positions of some draws, and products
# of controlled observables.
GRADIENTS, POSITIONS, CONTROLLED = "gradients", "positions", "controlled"


def rank_part(chain: int, rank: int, size: int) -> str:
    """Name of what one rank of a chain group keeps of a chain."""
    return f"chain-{chain}" if size == 1 else f"chain-{chain}-rank-{rank}"


def write_subject(
    folder: Path, observables: Sequence[str], records: Sequence[ChainRecord], traces: Sequence[np.ndarray]
) -> list[Path]:
    """Write traces.parquet and chains.json; returns their paths.

    Args:
        folder: of the subject.
        observables: names.
        records: of all chains.
        traces: mean loss and observables of every chain's draws [draw, 1 + observable].
    """
    columns: dict[str, list] = {name: [] for name in ("chain", "draw", "loss", *observables)}
    for record, rows in zip(records, traces, strict=True):
        columns["chain"].append(np.full(len(rows), record.chain, np.int32))
        columns["draw"].append(np.arange(len(rows), dtype=np.int32))
        for name, column in zip(("loss", *observables), rows.T, strict=True):
            columns[name].append(column)
    write_parquet(folder / "traces.parquet", pa.table({k: np.concatenate(v) for k, v in columns.items()}))
    write_json(folder / "chains.json", [dataclasses.asdict(record) for record in records])
    return [folder / "traces.parquet", folder / "chains.json"]


def read_records(folder: Path) -> list[ChainRecord]:
    """How the chains of a subject ended."""
    return [ChainRecord(**record) for record in json.loads((folder / "chains.json").read_text())]


def read_traces(folder: Path, chains: Sequence[int]) -> dict[str, np.ndarray]:
    """Traces of the loss and the observables, name -> [chain, draw], of the chains named."""
    table, _ = read_parquet(folder / "traces.parquet", ("chain", "draw", "loss"))
    chain_of_row = table["chain"].to_numpy()
    return {
        name: np.stack([table[name].to_numpy()[chain_of_row == chain] for chain in chains])
        for name in table.column_names
        if name not in ("chain", "draw")
    }


def read_chains(folder: Path) -> tuple[list[CoMoments], dict[int, str]]:
    """Co-moments of the healthy chains over the probe columns of all shards, and the others as chain -> reason.

    What a chain says of itself is checked: one that lacks draws, or whose moments are not finite, is left out as well.

    Raises:
        PatterningError: a file is missing or damaged.
    """
    records = read_records(folder)
    claimed = [read_chain(folder, r.chain) for r in records if r.healthy]
    healthy, excluded = healthy_chains(claimed)
    return healthy, {r.chain: r.reason for r in records if not r.healthy} | excluded


def read_chain(folder: Path, chain: int) -> CoMoments:
    """Co-moments of one chain over the probe columns of all shards, as it left them.

    Raises:
        PatterningError: a file is missing or damaged.
    """
    return _joined(_shards(folder, chain))


def read_gradients(storage: Storage, subject: str, chains: Sequence[int], rank: int = 0, size: int = 1) -> np.ndarray:
    """Means over the draws of the position, then of the gradients of the split losses [chain, 1 + split, coordinate].

    Of a chain group every rank has a file of its own coordinates.

    Raises:
        PatterningError: a file is missing or damaged.
    """
    return np.stack([found["means"] for found in _results(storage, subject, GRADIENTS, chains, rank, size)])


def read_positions(storage: Storage, subject: str, chains: Sequence[int], rank: int = 0, size: int = 1) -> np.ndarray:
    """Positions of the draws that were kept of chains [chain, kept draw, coordinate].

    Of a chain group every rank has a file of its own coordinates.

    Raises:
        PatterningError: a file is missing or damaged.
    """
    return np.stack([found["positions"] for found in _results(storage, subject, POSITIONS, chains, rank, size)])


def read_controlled(
    storage: Storage, subject: str, chains: Sequence[int], columns: slice | np.ndarray
) -> list[CoMoments]:
    """Co-moments of the controlled observables of chains, of some of the probe columns; the last is the mean loss L.

    Raises:
        PatterningError: a file is missing or damaged.
    """
    # The first rank of a chain group has them all.
    size = 2 if any("-rank-" in name for name in storage.names(f"sampling/{subject}/{CONTROLLED}")) else 1
    found = (_results(storage, subject, CONTROLLED, [chain], 0, size)[0] for chain in chains)
    return [CoMoments.from_state_dict(arrays).columns(columns) for arrays in found]


def _results(
    storage: Storage, subject: str, statistic: str, chains: Sequence[int], rank: int, size: int
) -> list[dict[str, np.ndarray]]:
    folder = f"sampling/{subject}/{statistic}"
    parts = (rank_part(chain, rank, size) for chain in chains)
    return [_newest(Snapshots(storage, folder, part), f"{folder}/{part}") for part in parts]


def _shards(folder: Path, chain: int) -> list[CoMoments]:
    there = (path for path in folder.glob("shard-*") if any(path.iterdir()))  # empty ones are of another layout
    shards = sorted(there, key=lambda path: int(path.name.removeprefix("shard-")))
    snapshots = {path: Snapshots(LocalStorage(folder), path.name, f"chain-{chain}") for path in shards}
    return [stored_moments(_newest(stored, str(path))) for path, stored in snapshots.items()]


def _joined(parts: list[CoMoments]) -> CoMoments:
    """One chain over the columns of all shards, without their columns of the mean loss."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name)[..., :-1] for part in parts], axis=-1)

    return dataclasses.replace(
        parts[0], mean_loss=joined("mean_loss"), m2_loss=joined("m2_loss"), comoment=joined("comoment")
    )


def _newest(snapshots: Snapshots, where: str) -> dict[str, np.ndarray]:
    found: list[str] = []
    stored = dataclasses.replace(snapshots, damaged=found.append).newest()
    if stored is None:
        raise PatterningError(
            f"{where}: {'; '.join(found) or 'nothing is there'}; delete the folder of this component and run the same "
            "command again"
        )
    return unpack(stored[1])
