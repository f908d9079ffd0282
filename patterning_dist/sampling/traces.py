"""The probe losses of every draw, kept on disk: only on request, for they grow with the number of draws.

A zarr array [chain, draw, sample] whose blocks belong to one chain each, so that the process which runs a chain is the
only one to write them, and memory holds one block.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from patterning_dist.sampling.statistics import Draw
from patterning_dist.sampling.target import Target
from patterning_dist.storage.files import explained

# Draws of one block: few enough for memory, enough for files of a useful size.
_BLOCK = 16
_DIMENSIONS = "_ARRAY_DIMENSIONS"  # where xarray looks for the names of the axes


def trace_store(directory: Path, subject: str) -> Path:
    """Where the traces of a subject are, in a run directory."""
    return directory / "sampling" / subject / "losses.zarr"


def create_traces(store: Path, num_chains: int, num_draws: int, num_samples: int, thin: int) -> None:
    """Make the array, all NaN, over whatever is there; xarray opens it.

    Args:
        store: a folder, from ``trace_store``.
        num_chains: chains of the subject.
        num_draws: of a chain, of which every ``thin``-th is kept, from the first on.
        num_samples: probe entries of a draw.
        thin: see above.
    """
    import zarr

    group = zarr.open_group(store, mode="w", zarr_format=2)
    group.attrs.update({"long_name": "l_i(w) - l_i(w*) of every probe entry", "units": "nats"})
    kept = len(range(0, num_draws, thin))
    group.create_array(
        "losses",
        shape=(num_chains, kept, num_samples),
        chunks=(1, min(_BLOCK, kept), num_samples),
        dtype="float32",
        fill_value=np.nan,
        attributes={_DIMENSIONS: ["chain", "draw", "sample"]},
    )
    for name, values in (("chain", np.arange(num_chains)), ("draw", np.arange(0, num_draws, thin))):
        # Without a fill value: xarray would take the zeros for missing numbers.
        coordinate = group.create_array(
            name, shape=values.shape, dtype=values.dtype, fill_value=None, attributes={_DIMENSIONS: [name]}
        )
        coordinate[:] = values
    zarr.consolidate_metadata(group.store, zarr_format=2)


class TraceRecorder:
    """A ``Statistic`` that writes the probe losses of one chain, block by block.

    Args:
        store: made by ``create_traces``.
        chain: number of the chain.
        thin: every ``thin``-th draw is kept.
        num_draws: of the chain.
    """

    def __init__(self, store: Path, chain: int, thin: int, num_draws: int) -> None:
        import zarr

        self._store = store
        self._losses: Any = zarr.open_group(store, mode="r+")["losses"]  # an array, which zarr does not know before
        self._chain, self._thin, self._num_draws = chain, thin, num_draws
        self._block: list[np.ndarray] = []
        self._end = 0  # rows of the chain up to the end of the block

    def update(self, draw: Draw, target: Target) -> None:
        """Take in the next draw of the chain; full blocks, and the last one, are written at once.

        Raises:
            PatterningError: the disk is full or not writable.
        """
        kept, is_kept = draw.number // self._thin, draw.number % self._thin == 0
        if is_kept:
            self._block.append(draw.losses[: self._losses.shape[2]].astype(np.float32))
        is_full = is_kept and (kept + 1) % self._losses.chunks[1] == 0
        self._end = kept + 1
        if is_full or draw.number + 1 == self._num_draws:
            self.flush()

    def flush(self) -> None:
        """Write the block as far as it goes.

        Raises:
            PatterningError: the disk is full or not writable.
        """
        if self._block:
            with explained(self._store):
                self._losses[self._chain, self._end - len(self._block) : self._end] = np.stack(self._block)
            self._block = []

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: a flush writes it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Later draws are written over, where they lie."""
        self._block = []

    def result(self) -> None:
        """The store has it."""
        return None
