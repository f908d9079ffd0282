"""The level at which training losses are weighed: every loss by itself, or all of a sequence, a document, a pair.

With rho = 1 + h_g for all losses i of a unit g, d<phi>/dh_g = (n_beta / n) sum_{i in g} chi_i: chi of a unit is the sum
over its losses. Weights of units are solved for with the mean of chi in each unit in the place of chi: the solution of
least norm is a combination of rows of chi, which bounds cut entry by entry, so that it is the same throughout a unit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from patterning_dist.config.response import Level
from patterning_dist.errors import PatterningError
from patterning_dist.response.columns import StoredShard
from patterning_dist.stages.masses import dealt, kept_groups
from patterning_dist.stages.scores import Pool, Scores
from patterning_dist.storage.files import write_npy


@dataclass(frozen=True)
class Units:
    """Which losses of the pool weigh the same.

    Attributes:
        level: of the units.
        of: number of the unit of every entry [entry].
        values: of the column by which a unit is known [unit].
        sizes: losses of each that count [unit].
    """

    level: Level
    of: np.ndarray
    values: np.ndarray
    sizes: np.ndarray

    def sums(self, chi: np.ndarray) -> np.ndarray:
        """chi of the units [..., unit] from that of the entries [..., entry]."""
        return self._over(chi, self.of, len(self.sizes))[0]

    def means(self, chi: np.ndarray, part: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Mean of the unit in the place of every entry [..., entry].

        Args:
            chi: of the entries [..., entry].
            part: which entries they are; default: all.
        """
        _, of = np.unique(self.of[part], return_inverse=True)
        sums, sizes = self._over(chi, of, 1 + of.max(initial=-1))
        return (sums / sizes)[..., of].astype(chi.dtype)

    def check_whole(self, groups: np.ndarray, where: str) -> None:
        """Raises PatterningError where the entries of a unit are of several groups [entry]."""
        if not np.array_equal(groups, self._of_first(groups)[self.of]):
            raise PatterningError(
                f"{where}: a {self.level} has one weight, and some are of several of these groups; remove it"
            )

    def dealt(self, weights: np.ndarray, groups: np.ndarray | None, seed: int) -> np.ndarray:
        """``masses.dealt`` of whole units [entry]."""
        kept = None if groups is None else self._of_first(groups)
        return dealt(self._of_first(weights), kept, seed)[self.of]

    def _of_first(self, values: np.ndarray) -> np.ndarray:
        """That of the first entry of every unit [unit]."""
        return values[np.unique(self.of, return_index=True)[1]]

    @staticmethod
    def _over(chi: np.ndarray, of: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
        rows = chi.reshape(-1, chi.shape[-1])
        sums = np.stack([np.bincount(of, row, num) for row in rows]) if len(rows) else np.zeros((0, num))
        return sums.reshape(*chi.shape[:-1], num), np.bincount(of, minlength=num)


def units_of(pool: Pool) -> Units | None:
    """Those of section solve; None where every loss is weighed by itself.

    Raises:
        PatterningError: the samples know of no documents, or masses that are kept cut through units.
    """
    assert pool.config.solve is not None
    level, task = pool.config.solve.level, pool.subjects.task
    if level in (None, "token"):
        return None
    assert level is not None
    column = "document" if level == "document" else task.key
    known = task.index(task.train, np.arange(pool.num_samples))
    if column not in known:
        raise PatterningError(f"solve.level: nothing is known of a {level} of these samples; choose sequence")
    values, of, sizes = np.unique(known[column][pool.index[task.key]], return_inverse=True, return_counts=True)
    units = Units(level, of, values, sizes)
    if (groups := kept_groups(pool)) is not None:
        units.check_whole(groups, "solve.keep_mass")
    return units


def at_level(scores: Scores, units: Units | None, file: Path) -> Scores:
    """Scores that are the same throughout a unit; those of the pool in a file, one row after the other."""
    if units is None:
        return scores
    per_chain = units.means(scores.per_chain, scores.in_subset)
    rows = range(len(scores.observables))
    write_npy(file, (len(rows), len(scores.in_subset)), (units.means(scores.row(k)) for k in rows))
    return replace(scores, chi=[StoredShard(file)], per_chain=per_chain)
