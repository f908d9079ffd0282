"""chi by columns, wherever they lie: passes over shards [observable, sample], in pieces that fit a processor's cache.

A shard is an array, or a ``.npy`` file of which only what is asked for is read. Where one ends changes sums over
samples by their rounding, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from patterning_dist.errors import PatterningError
from patterning_dist.response.moments import Floats

PIECE = 1 << 19  # numbers of a piece, 4 MB in float64: the columns of one are as many fewer as there are more rows
SAMPLE = 1 << 16  # columns from which a solve starts where there are many more
_FEW = 4  # times as many columns as in a sample are hardly more
_SAMPLE_SEED = 0x73747274


class Shard(Protocol):
    """Columns of chi, of which a slice can be had."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, key: tuple[slice, slice], /) -> np.ndarray: ...


class Survey(NamedTuple):
    """Means [observable] and covariance (1/n) of the rows over samples, and a part of the columns [observable, sample].

    The part is empty where all columns are hardly more.
    """

    mean: Floats
    covariance: Floats
    sample: Floats


Chi = np.ndarray | Sequence[Shard | Path]


class StoredShard:
    """A shard in a ``.npy`` file, less a number a row. It is opened for every slice: no page of it stays mapped."""

    def __init__(self, path: Path, less: Floats | None = None) -> None:
        self._path, self._less = path, less
        self.shape: tuple[int, ...] = np.load(path, mmap_mode="r").shape

    def __getitem__(self, key: tuple[slice, slice], /) -> np.ndarray:
        found = np.array(np.load(self._path, mmap_mode="r")[key])
        return found if self._less is None else (found - self._less[key[0], None]).astype(found.dtype)


class Columns:
    """All columns in turn, in pieces of float64 [observable, sample]; counts how often that was done.

    Raises PatterningError for shards that are not of the same observables.
    """

    def __init__(self, chi: Chi) -> None:
        given = [chi] if isinstance(chi, np.ndarray) else list(chi)
        self.shards = [StoredShard(shard) if isinstance(shard, Path) else shard for shard in given]
        if not self.shards or any(len(shard.shape) != 2 or shard.shape[0] != self.num_rows for shard in self.shards):
            raise PatterningError("chi: expected [observable, sample] or column shards of it with the same observables")
        self.num_samples = sum(shard.shape[1] for shard in self.shards)
        self.num_passes = 0

    @property
    def num_rows(self) -> int:
        return self.shards[0].shape[0]

    @property
    def in_memory(self) -> bool:
        return all(type(shard) is np.ndarray for shard in self.shards)

    def __iter__(self) -> Iterator[Floats]:
        self.num_passes += 1
        step = max(PIECE // max(self.num_rows, 1), 1)
        for shard in self.shards:
            for start in range(0, shard.shape[1], step):
                yield np.asarray(shard[:, start : start + step], np.float64)

    def survey(self) -> Survey:
        """Moments and a sample of the columns, in one pass: Chan, Golub & LeVeque (1983).

        Raises PatterningError for an entry that is not finite.
        """
        count, mean = 0, np.zeros(self.num_rows)
        products = np.zeros((self.num_rows, self.num_rows))
        ids = self._sample_ids()
        sample = np.empty((self.num_rows, len(ids)))
        for piece in self:
            size, (first, last) = piece.shape[1], np.searchsorted(ids, [count, count + piece.shape[1]])
            sample[:, first:last] = piece[:, ids[first:last] - count]
            with np.errstate(invalid="ignore"):
                here = check_finite(piece.mean(axis=1))
            centered, away = piece - here[:, None], here - mean
            count += size
            mean = mean + size / count * away
            products += centered @ centered.T + (count - size) * size / count * np.outer(away, away)
        covariance = products / max(count, 1)
        # A constant row leaves rounding only, which must not pass for a response.
        constant = np.sqrt(np.diag(covariance)) <= 1e-12 * np.abs(mean)
        covariance[constant] = covariance[:, constant] = 0.0
        return Survey(mean, covariance, sample)

    def _sample_ids(self) -> np.ndarray:
        """One column of every run of n / SAMPLE, wherever shards end: periods of the pool must not show in it."""
        length = self.num_samples // SAMPLE
        if length < _FEW:
            return np.empty(0, np.int64)
        number = self.num_samples // length
        return length * np.arange(number) + np.random.default_rng(_SAMPLE_SEED).integers(length, size=number)


def check_finite(sums: Floats) -> Floats:
    """The sums over chi, which are not finite where an entry is not. Raises PatterningError then."""
    if not np.isfinite(sums).all():
        raise PatterningError("chi: has an entry that is not finite; leave out the chains or samples it comes from")
    return sums
