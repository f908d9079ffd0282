"""The parameter server: one actor that reduces the draws of all chains to co-moments as they arrive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import ray

from patterning_dist.response.ledger import Answer, ChainRecord, Ledger


@ray.remote(num_cpus=0)
class Aggregator:
    """A ledger for every component of the study; arguments as in ``Ledger``."""

    def __init__(self, ledgers: dict[str, Ledger]) -> None:
        self._ledgers = ledgers
        self._num_written = 0  # draws of the ledgers that are on disk, and here no more

    def open(self, component: str, chain: int) -> None:
        """Begin a chain (again)."""
        self._ledgers[component].open(chain)

    def push(
        self,
        component: str,
        chain: int,
        sequence_number: int,
        observables: np.ndarray,
        losses: np.ndarray,
        mean_losses: np.ndarray,
    ) -> Answer:
        """Take in consecutive draws of a chain, once."""
        return self._ledgers[component].push(chain, sequence_number, observables, losses, mean_losses)

    def close(self, component: str, record: ChainRecord, arrays: dict[str, np.ndarray]) -> None:
        """Note how a chain ended."""
        self._ledgers[component].close(record, arrays)

    def num_draws(self) -> int:
        """Draws taken in so far, of all chains."""
        return self._num_written + sum(ledger.num_recorded for ledger in self._ledgers.values())

    def write(self, component: str, folder: Path) -> None:
        """Write a component's statistics to its folder of the run directory, and let go of them."""
        ledger = self._ledgers[component]
        ledger.write(folder)
        self._num_written += ledger.num_recorded
        del self._ledgers[component]
