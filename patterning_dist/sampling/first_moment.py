"""First moments of losses under the posterior of a component: what its free energy says of every sample.

The free energy of p_C(w) ~ exp( -n_beta (L(w) - L(w*)) - gamma/2 |w - w*|^2 ) over the coordinates of a component C,
F = -log of its normalisation, responds to the weight of a sample, rho_i = 1 + h_i (Wang & Murfet, 2601.13548), by

    dF / dh_i = (n_beta / n) m_i ,     m_i = < (l_i - L)(w) - (l_i - L)(w*) >_C

A sample that suffers more than others where the component is disturbed has m_i > 0: more weight on it makes the
component matter more. A mean, and not a covariance: it needs few draws.

The draws are those of chains, or chain-free: w* +- u, u ~ N(0, I / gamma), the localisation alone, which the posterior
is where gamma dominates n_beta H. The two signs cancel the linear part of l_i, which is most of the noise and has mean
zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from patterning_dist.models.components import Vector, axpy, scaled
from patterning_dist.sampling.layered import Prepared
from patterning_dist.sampling.noise import Noise
from patterning_dist.sampling.target import Target

_CHAIN = 0x6D6F6D  # address of the noise, apart from those of chains (small numbers)


def mean_rises(target: Target, samples: Prepared, groups: Sequence[Iterable[Vector]]) -> Tensor:
    """l_i(w) - l_i(w*), mean over the positions w of each group, nats, float64 [group, sample(, position)].

    Args:
        target: left at w*. On a chain group all ranks call this, each with its part of the positions.
        samples: whose losses are taken.
        groups: positions; a pair of draws, the draws of a chain, or where a component is ablated.
    """
    target.move_to(target.center)
    at_center = target.losses(samples)
    rises = torch.zeros(len(groups), *at_center.shape, dtype=torch.float64)
    for row, positions in enumerate(groups):
        number = 0
        for position in positions:
            number += 1
            target.move_to(position)
            rises[row] += target.losses(samples) - at_center
        rises[row] /= number
    target.move_to(target.center)
    return rises


def antithetic_pair(target: Target, number: int, *, seed: int, gamma: float) -> tuple[Vector, Vector]:
    """w* + u and w* - u, u ~ N(0, I / gamma); the same wherever and on however many ranks it is drawn.

    Args:
        target: has w*.
        number: of the pair.
        seed: of all pairs.
        gamma: localisation [1 / weight^2].
    """
    shapes = {name: w.shape for name, w in target.center.items()}
    noise = Noise(seed, _CHAIN, number, target.extents, shapes, target.device)
    u = scaled(1 / math.sqrt(gamma), noise)
    return axpy(1.0, u, target.center), axpy(-1.0, u, target.center)
