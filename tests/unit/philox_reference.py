"""Philox4x64-10 by the paper, in plain Python integers, and one normal number at a time made from it.

Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3. The oracle of
``patterning_dist.sampling.noise``: slow, and with no step in common but the definition.
"""

from __future__ import annotations

import math

import numpy as np

WORD = 2**64 - 1
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)  # golden ratio, sqrt(3) - 1

# Random123's known answers: counter, key -> block.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
    ),
    (
        (WORD, WORD, WORD, WORD),
        (WORD, WORD),
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
]


def philox4x64(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """One block of four 64-bit words: ten rounds of multiply, exchange and xor, the key bumped in between."""
    x, k = list(counter), list(key)
    for _ in range(10):
        left, right = MULTIPLIERS[0] * x[0], MULTIPLIERS[1] * x[2]
        x = [(right >> 64) ^ x[1] ^ k[0], right & WORD, (left >> 64) ^ x[3] ^ k[1], left & WORD]
        k = [(k[0] + WEYL[0]) & WORD, (k[1] + WEYL[1]) & WORD]
    return tuple(x)


def word(key: tuple[int, ...], step: int, index: int) -> int:
    """The 32-bit word, signed, that belongs to flat element ``index``: eight of them a block, low halves first.

    Block number 1 holds elements 0 to 7.
    """
    block = philox4x64((index // 8 + 1, step, 0, 0), key)
    bits = block[index % 8 // 2] >> (32 * (index % 2)) & 0xFFFFFFFF
    return bits - 2**32 if bits >= 2**31 else bits


def normal(key: tuple[int, ...], step: int, index: int) -> float:
    """Element ``index`` of the noise: in tiles of 512, words 0 to 255 give radii and words 256 to 511 angles."""
    tile, place = divmod(index, 512)
    half, pair = divmod(place, 256)
    # Words become float32 once; everything after that is exact here and rounded to float32 there.
    radius_word = float(np.float32(word(key, step, 512 * tile + pair)))
    angle_word = np.float32(word(key, step, 512 * tile + 256 + pair))
    radius = math.sqrt(-2 * math.log(max(abs(radius_word), 0.5) / 2**31))
    angle = float(angle_word * np.float32(math.pi / 2**31))
    return radius * (math.sin(angle) if half else math.cos(angle))
