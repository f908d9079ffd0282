"""Noise that is addressed, not consumed: the same (seed, chain, step, parameter) always gives the same numbers.

A chain can therefore be stopped and resumed at any step, on any actor, and draw what it would have drawn.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def standard_normal(seed: int, chain: int, step: int, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Independent N(0, 1) numbers shaped like every tensor of ``like``, in float32.

    Args:
        seed: of the component's set of chains.
        chain: number of the chain.
        step: number of the SGLD step, from 0.
        like: parameter name -> tensor; its order numbers the parameters.
    """
    noise = {}
    for index, (name, tensor) in enumerate(like.items()):
        # SeedSequence hashes its four words, so neighbouring chains and steps get unrelated streams.
        word = int(np.random.SeedSequence((seed, chain, step, index)).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(word)
        noise[name] = torch.randn(tensor.shape, generator=generator).to(tensor.device)
    return noise
