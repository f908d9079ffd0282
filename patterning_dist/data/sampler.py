"""Which samples a step sees: a pure function of (seed, stream, step), whatever was drawn before.

Numbers come from Philox 4x64-10 (Salmon et al., SC 2011) keyed by (seed, stream), its counter starting at
(0, step, use, 0). Only the bit generator's raw words are used, which NumPy keeps stable across releases.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

# The third counter word: two uses of one (seed, stream) never share a number.
_MINIBATCH, _PERMUTATION = 1, 2


def _raw(seed: int, stream: int, step: int, use: int, num: int) -> np.ndarray:
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, step, use, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(num)


def minibatch(seed: int, stream: int, step: int, batch_size: int, population: int) -> np.ndarray:
    """`batch_size` ids (int64), independent and uniform on [0, population), with replacement.

    Raises ValueError for an empty population.
    """
    if population < 1:
        raise ValueError(f"population is {population}; expected at least 1")
    # 53 bits to a double in [0, 1): the floor is uniform to within population * 2^-53.
    unit = (_raw(seed, stream, step, _MINIBATCH, batch_size) >> np.uint64(11)) * 2.0**-53
    return np.minimum((unit * population).astype(np.int64), population - 1)


def distinct_minibatch(seed: int, stream: int, step: int, batch_size: int, population: int) -> np.ndarray:
    """`batch_size` different ids (int64), all choices equally likely; every id in order if there are no more.

    The ids of `minibatch` without those that have come already, and as many more as are then missing. The mean over
    such a batch has (population - batch_size) / (population - 1) of the variance that draws with replacement have: none
    for a batch of everything.
    """
    if batch_size >= population > 0:
        return np.arange(population)
    num = batch_size
    while True:
        ids = minibatch(seed, stream, step, num, population)  # begins with the ids of a smaller one
        first = np.unique(ids, return_index=True)[1]
        if len(first) >= batch_size:
            return ids[np.sort(first)[:batch_size]]
        num *= 2


def permutation(seed: int, stream: int, num: int) -> np.ndarray:
    """A uniform permutation of range(num) (int64): the order of `num` random words."""
    return np.argsort(_raw(seed, stream, 0, _PERMUTATION, num), kind="stable").astype(np.int64)


_epoch_order = lru_cache(maxsize=4)(permutation)


def epoch_batch(seed: int, step: int, batch_size: int, population: int) -> np.ndarray:
    """Batch number `step` (ids, int64) of a pass without replacement: a fresh permutation every epoch.

    Epochs follow each other without a gap, so that a batch may hold the end of one and the start of the next.
    Raises ValueError for an empty population.

    Examples:
        >>> batches = [epoch_batch(seed=0, step=step, batch_size=3, population=6) for step in (0, 1)]
        >>> np.sort(np.concatenate(batches))  # every sample once
        array([0, 1, 2, 3, 4, 5])
    """
    if population < 1:
        raise ValueError(f"population is {population}; expected at least 1")
    ids = np.empty(batch_size, dtype=np.int64)
    filled = 0
    while filled < batch_size:
        epoch, offset = divmod(step * batch_size + filled, population)
        part = _epoch_order(seed, epoch, population)[offset : offset + batch_size - filled]
        ids[filled : filled + len(part)] = part
        filled += len(part)
    return ids


def weighted_minibatch(seed: int, stream: int, step: int, batch_size: int, cumulative: np.ndarray) -> np.ndarray:
    """`batch_size` ids (int64), independent, id i with probability proportional to its weight, with replacement.

    The same numbers as `minibatch` go through the inverse of the distribution function: runs of one seed under two
    weightings see much the same samples.

    Args:
        seed, stream, step: as in `minibatch`.
        batch_size: number of ids.
        cumulative: running sums of the weights [sample], float64.

    Examples:
        >>> weighted_minibatch(0, 0, step=7, batch_size=4, cumulative=np.cumsum([0.0, 0.0, 1.0]))
        array([2, 2, 2, 2])
    """
    unit = (_raw(seed, stream, step, _MINIBATCH, batch_size) >> np.uint64(11)) * 2.0**-53
    return np.searchsorted(cumulative, unit * cumulative[-1], side="right").clip(max=len(cumulative) - 1)
