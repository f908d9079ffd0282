"""Singular modes of the susceptibilities of a checkpoint's heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.measure.analysis import SIGN
from patterning_dist.measure.results import table_name
from patterning_dist.response.modes import susceptibility_modes
from patterning_dist.storage.files import read_parquet, write_parquet
from patterning_dist.storage.run import RunDirectory

_TOP_ENTRIES = 12


def write_modes(
    run: RunDirectory, heads: list[str], observable: str, num_modes: int, index: dict[str, np.ndarray]
) -> tuple[dict[str, Any], list[str]]:
    """Modes of chi [head, probe entry] of one observable, as tables; what is said of them, and the files written.

    Args:
        run: holds the susceptibility tables.
        heads: subjects at one checkpoint, two or more.
        observable: whose rows of chi are taken.
        num_modes: that are kept, at most.
        index: what every probe entry is of [entry].
    """
    column = f"chi_{observable}"
    tables = (read_parquet(run.path / table_name(head), [column])[0] for head in heads)
    matrix = np.stack([table[column].to_numpy().astype(np.float64) for table in tables])
    modes = susceptibility_modes(matrix, rows="standardized")
    kept = min(num_modes, len(heads))
    table = {"mode": np.arange(kept, dtype=np.int32), "singular_value": modes.singular_values[:kept]}
    table |= {head.rpartition("/")[2]: modes.left[i, :kept] for i, head in enumerate(heads)}
    metadata = {"observable": observable, "rows": "heads, centred and standardised over entries", "sign": SIGN}
    folder = table_name(heads[0]).rpartition("/")[0]
    files = [f"{folder}/modes.parquet", f"{folder}/mode-tokens.parquet"]
    write_parquet(run.path / files[0], pa.table(table), metadata)
    write_parquet(run.path / files[1], pa.table(_top_entries(modes.right[:kept], index)), metadata)
    described = {
        "components": heads,
        "observable": observable,
        "singular_values": modes.singular_values,
        "explained_variance": modes.explained_variance,
    }
    return described, files


def _top_entries(right: np.ndarray, index: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The entries at both ends of every mode, with what they are of."""
    rows = []
    for mode, scores in enumerate(right):
        order = np.argsort(scores)
        for sign, chosen in ((-1, order[:_TOP_ENTRIES]), (1, order[::-1][:_TOP_ENTRIES])):
            rows += [(mode, sign, rank, entry, scores[entry]) for rank, entry in enumerate(chosen)]
    modes, signs, ranks, entries, values = map(np.array, zip(*rows, strict=True))
    named = {
        name: column[entries] for name, column in index.items() if name in ("sequence_id", "sample_id", "position")
    }
    return {"mode": modes, "sign": signs, "rank": ranks, **named, "score": values}
