"""Noise that is addressed, not consumed: the number of (seed, chain, step, piece, flat element) is always the same.

A rank that holds elements [start, stop) of a piece makes those numbers and no others, and they are bit for bit what a
single rank makes there. A chain can so be stopped, resumed and laid out again, and draw what it would have drawn.

On the CPU the words come from Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
with a key hashed from (seed, chain, piece) and the counter (block, step, 0, 0); Box & Muller (1958) turns words into
normals (words are the same everywhere; a normal's last bit may depend on whether the processor has fused multiply-add).
On other devices torch's own generator is seeded again for every block of fixed bounds. The two routes give different
numbers, and so may a GPU of another model or another torch, since torch deals its numbers out by the size of the GPU: a
chain keeps to one kind of device.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

Extent = tuple[int, int]  # (start, stop) of flat element numbers within the whole piece

_BLOCK = 8  # normals of one Philox block: four 64-bit words, each read as two of 32 bits
_TILE = 512  # normals made together, so that Box-Muller runs on contiguous halves
_SLAB = 64 * _TILE  # normals whose temporaries stay in a core's cache
_SLABS_PER_THREAD = 8  # fewer are not worth the start of a thread
# First elements of the blocks of torch's generator: small ones first, so that a small piece stays cheap.
_GENERATOR_BLOCK = 2**22
_GENERATOR_STARTS = (0, 2**16, 2**19, _GENERATOR_BLOCK)

# Operands of the arithmetic, as arrays: on small pieces that is faster than scalars.
_HALF, _MINUS_TWO = np.array(0.5, np.float32), np.array(-2, np.float32)
_TO_UNIT, _TO_ANGLE = np.array(2.0**-31, np.float32), np.array(math.pi * 2.0**-31, np.float32)
_EMPTY_BUFFER = np.zeros(4, np.uint64)

_local = threading.local()


class Noise(Mapping[str, Tensor]):
    """This rank's noise of one step, piece by piece: made when asked for, never kept.

    Args:
        seed, chain, step: see ``standard_normal``.
        extents: piece name -> flat elements of the piece that this rank holds.
        shapes: piece name -> shape of what it holds.
        device: of the numbers.
    """

    def __init__(
        self,
        seed: int,
        chain: int,
        step: int,
        extents: Mapping[str, Extent],
        shapes: Mapping[str, Sequence[int]],
        device: torch.device | str = "cpu",
    ) -> None:
        self._address, self._device = (seed, chain, step), device
        self._extents, self._shapes = extents, shapes

    def __getitem__(self, name: str) -> Tensor:
        start, stop = self._extents[name]
        return standard_normal(*self._address, name, start, stop, self._device).view(tuple(self._shapes[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._extents)

    def __len__(self) -> int:
        return len(self._extents)


def standard_normal(
    seed: int, chain: int, step: int, piece: str, start: int, stop: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Independent N(0, 1) numbers of the flat elements [start, stop) of a piece, [stop - start] in float32.

    x = r cos(a), y = r sin(a), r = sqrt(-2 log u), u uniform on (0, 1], a on [-pi, pi] (Box & Muller, 1958). u is a
    multiple of 2^-31, or 2^-32 at least: no number on the CPU is larger than sqrt(64 log 2) = 6.66 (one in 4e10 of
    a true normal is).

    Args:
        seed: of the set of chains.
        chain: number of the chain.
        step: number of the step, from 0.
        piece: name of the piece; pieces of different names have unrelated numbers.
        start, stop: flat (row-major) element numbers within the whole piece, 0 <= start <= stop.
        device: where the numbers are wanted; it decides between the two routes above.

    Examples:
        >>> whole = standard_normal(seed=0, chain=1, step=2, piece="weight", start=0, stop=8)
        >>> parts = [standard_normal(0, 1, 2, "weight", start, stop) for start, stop in ((0, 3), (3, 8))]
        >>> torch.equal(torch.cat(parts), whole)  # however it is cut over ranks
        True
    """
    if torch.device(device).type == "cpu":
        return _philox_normal(_key(seed, chain, piece), step, start, stop)
    return _generator_normal(f"{seed}/{chain}/{step}/{piece}", start, stop, device)


def _philox_normal(key: np.ndarray, step: int, start: int, stop: int) -> Tensor:
    """The CPU's route: whole tiles around [start, stop), trimmed."""
    first, last = start // _TILE, -(-stop // _TILE)
    normals = np.empty((last - first, 2, _TILE // 2), np.float32)
    tiles = _SLAB // _TILE
    slabs = range(0, last - first, tiles)

    def fill(slab: int) -> None:
        _box_muller(_words(key, step, first + slab, out := normals[slab : slab + tiles]), out)

    num_threads = min(torch.get_num_threads(), len(slabs) // _SLABS_PER_THREAD)
    if num_threads > 1:
        with ThreadPoolExecutor(num_threads) as pool:  # numpy lets go of the interpreter's lock in all of fill
            list(pool.map(fill, slabs))
    else:
        for slab in slabs:
            fill(slab)
    offset = first * _TILE
    return torch.from_numpy(normals.reshape(-1))[start - offset : stop - offset]


def _words(key: np.ndarray, step: int, tile: int, like: np.ndarray) -> np.ndarray:
    """The 32-bit words of the tiles from ``tile`` on, int32, shaped like ``like``: one word for each normal."""
    philox = _philox()
    # The counter is raised before it is used: the first block of element 0 is number 1.
    counter = np.array((tile * (_TILE // _BLOCK), step, 0, 0), np.uint64)
    philox.state = {
        "bit_generator": "Philox",
        "state": {"counter": counter, "key": key},
        "buffer": _EMPTY_BUFFER,
        "buffer_pos": 4,  # nothing left over
        "has_uint32": 0,
        "uinteger": 0,
    }
    words = philox.random_raw(like.size // 2)
    return words.astype("<u8", copy=False).view("<i4").reshape(like.shape)


def _box_muller(words: np.ndarray, normals: np.ndarray) -> None:
    """Cosines into the first half of every tile, sines into the second; words and normals [tile, half, pair]."""
    radius, angle = words[:, 0].astype(np.float32), words[:, 1].astype(np.float32)
    # |-2^31| is no int32 but a fine float. Zero has half the probability of the others: so has u = 2^-32.
    np.abs(radius, out=radius)
    np.maximum(radius, _HALF, out=radius)
    np.multiply(radius, _TO_UNIT, out=radius)
    np.log(radius, out=radius)
    np.multiply(radius, _MINUS_TWO, out=radius)
    np.sqrt(radius, out=radius)
    np.multiply(angle, _TO_ANGLE, out=angle)
    np.multiply(radius, np.cos(angle), out=normals[:, 0])
    np.multiply(radius, np.sin(angle, out=angle), out=normals[:, 1])


def _generator_normal(address: str, start: int, stop: int, device: torch.device | str) -> Tensor:
    """The route of other devices: blocks between fixed bounds, the same whoever asks for a part of them."""
    generator = torch.Generator(device)
    parts = []
    while start < stop:
        first = max(b for b in (*_GENERATOR_STARTS, start // _GENERATOR_BLOCK * _GENERATOR_BLOCK) if b <= start)
        last = next((b for b in _GENERATOR_STARTS if b > first), first + _GENERATOR_BLOCK)
        word = hashlib.blake2b(f"{address}/{first}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(word, "little"))
        block = torch.randn(last - first, generator=generator, device=device)
        parts.append(block[start - first : stop - first])
        start = last
    return torch.cat(parts) if parts else torch.empty(0, device=device)


@lru_cache(maxsize=4096)
def _key(seed: int, chain: int, piece: str) -> np.ndarray:
    digest = hashlib.blake2b(f"{seed}/{chain}/{piece}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def _philox() -> np.random.Philox:
    # To build one costs seven microseconds, to set its state one; threads must not share it.
    if not hasattr(_local, "philox"):
        _local.philox = np.random.Philox(0)
    return _local.philox
