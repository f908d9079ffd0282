"""Random bracket strings: Dyck words, strings of unequal counts, and equal counts that do not nest.

A batch of strings of one length is an int8 array [string, position]: +1 is "(", -1 is ")". The depth after a position
is the cumulative sum up to it. Balanced (Dyck-1): no depth below zero, and the last one zero. Numbers come from a NumPy
generator that the caller seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.random import Generator

from patterning_dist.errors import PatterningError

# Batches drawn in a row without one new string, after which the supply of distinct strings counts as exhausted.
_PATIENCE = 200

# Depth at the end of strings with unequal counts and its shares; 8 stands for 8 and more.
_EXCESS, _EXCESS_SHARES = (2, 4, 6, 8), (0.4, 0.3, 0.2, 0.1)


def depths(strings: np.ndarray) -> np.ndarray:
    """Depth after every position [string, position]."""
    return np.cumsum(strings, axis=1, dtype=np.int32)


def is_balanced(strings: np.ndarray) -> np.ndarray:
    """Whether each string is a Dyck word [string]."""
    depth = depths(strings)
    return (depth.min(axis=1) >= 0) & (depth[:, -1] == 0)


def dyck_words(rng: Generator, number: int, length: int) -> np.ndarray:
    """Uniform Dyck words, by the cycle lemma (Dvoretzky & Motzkin 1947).

    Of the 2n + 1 rotations of a sequence of n opening and n + 1 closing brackets exactly one is a Dyck word followed
    by a closing bracket. So a uniform arrangement, rotated, is a uniform Dyck word.

    Args:
        rng: source of random numbers.
        number: of words.
        length: 2n, even and at least 2.

    Returns:
        int8 [string, position].
    """
    arrangements = _arrangements(rng, number, np.full(number, length // 2), length + 1)
    # The word begins behind the first place where the depth is lowest.
    starts = depths(arrangements).argmin(axis=1) + 1
    columns = (starts[:, None] + np.arange(length)) % (length + 1)
    return np.take_along_axis(arrangements, columns, axis=1)


def equal_counts(rng: Generator, number: int, length: int) -> np.ndarray:
    """Uniform strings with as many opening as closing brackets, nested or not; int8 [string, position]."""
    return _arrangements(rng, number, np.full(number, length // 2), length)


def unequal_uniform(rng: Generator, number: int, length: int) -> np.ndarray:
    """Uniform strings with unequal counts; int8 [string, position]."""
    strings = np.where(rng.random((2 * number + 16, length)) < 0.5, 1, -1).astype(np.int8)
    kept = strings[strings.sum(axis=1) != 0][:number]
    return kept if len(kept) == number else np.concatenate([kept, unequal_uniform(rng, number - len(kept), length)])


def unequal_stratified(rng: Generator, number: int, length: int) -> np.ndarray:
    """Strings with unequal counts that break nesting never, at once, or late, a third each; int8 [string, position].

    The depth at the end is 2, 4, 6 or at least 8 in absolute value, with shares .4, .3, .2 and .1 as far as strings of
    the kind can have it; given kind and depth, strings are uniform. "Never" ends above zero; "late" begins with "(" and
    is first below zero in the second half.

    Args:
        rng: source of random numbers.
        number: of strings.
        length: even and at least 4; shorter ones cannot break nesting late.
    """
    kinds = [_never_below, lambda strings: strings[:, 0] < 0, _late_below]
    sizes = np.diff(np.linspace(0, number, len(kinds) + 1).round().astype(int))
    return np.concatenate([_of_kind(rng, int(size), length, kind) for size, kind in zip(sizes, kinds, strict=True)])


def distinct(
    draw: Callable[[int], Iterable[np.ndarray]], number: int, taken: set[bytes], what: str
) -> list[np.ndarray]:
    """The first `number` different strings of a stream of batches, none of which is in `taken`; they are added to it.

    Raises:
        PatterningError: there are not as many.
    """
    found: list[np.ndarray] = []
    barren = 0
    while len(found) < number:
        before = len(found)
        for string in draw(max(256, number - len(found))):
            key = string.tobytes()
            if key not in taken and len(found) < number:
                taken.add(key)
                found.append(string)
        barren = barren + 1 if len(found) == before else 0
        if barren == _PATIENCE:
            raise PatterningError(
                f"task: {number} different {what} are wanted, and no more than {len(found)} were found; "
                "ask for fewer, or for longer strings"
            )
    return found


def _arrangements(rng: Generator, number: int, num_open: np.ndarray, length: int) -> np.ndarray:
    """Uniform arrangements of `num_open` [string] opening brackets in `length` places."""
    order = rng.random((number, length)).argsort(axis=1).argsort(axis=1)
    return np.where(order < num_open[:, None], 1, -1).astype(np.int8)


def _of_kind(rng: Generator, number: int, length: int, kind: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Strings of one kind by rejection, with the depths at the end wanted."""
    # Half the string must stay above zero before a late break: what follows cannot end deeper than half its length.
    deepest = length // 4 * 2 if kind is _late_below else length
    wanted = _end_depths(rng, number, deepest)
    found = np.zeros((number, length), np.int8)
    missing = np.arange(number)
    while len(missing):
        signs = np.where(rng.random(len(missing)) < 0.5, 1, -1)
        ends = wanted[missing] * (1 if kind is _never_below else signs)
        strings = _arrangements(rng, len(missing), (length + ends) // 2, length)
        good = kind(strings)
        found[missing[good]] = strings[good]
        missing = missing[~good]
    return found


def _end_depths(rng: Generator, number: int, deepest: int) -> np.ndarray:
    """Absolute depths at the end, up to the deepest possible."""
    possible = [(excess, share) for excess, share in zip(_EXCESS, _EXCESS_SHARES, strict=True) if excess <= deepest]
    values, shares = np.array([excess for excess, _ in possible]), np.array([share for _, share in possible])
    chosen = rng.choice(values, size=number, p=shares / shares.sum())
    most = chosen == _EXCESS[-1]
    chosen[most] = 2 * rng.integers(_EXCESS[-1] // 2, deepest // 2 + 1, size=most.sum())
    return chosen


def _never_below(strings: np.ndarray) -> np.ndarray:
    return depths(strings).min(axis=1) >= 0


def _late_below(strings: np.ndarray) -> np.ndarray:
    below = depths(strings) < 0
    return (strings[:, 0] > 0) & below.any(axis=1) & (below.argmax(axis=1) >= strings.shape[1] // 2)
