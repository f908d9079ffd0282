"""Stochastic gradient Nosé-Hoover thermostat (Ding et al., NeurIPS 2014): a momentum p, and a friction that adapts.

With U(w) = n_beta L(w) + gamma/2 |w - w*|^2 the equations of motion are, A the diffusion and mu the thermal mass,

    dw = p dt ,    dp = -grad U dt - xi p dt + sqrt(2 A) dB ,    dxi = ( |p|^2 / d - 1 ) / mu dt ,

which leave exp( -U(w) - |p|^2 / 2 - mu d / 2 (xi - A)^2 ) as it is: w has the law ``Posterior``. Minibatch noise in
grad U acts as more diffusion, of unknown size; xi rises until |p|^2 / d is 1 again, and the law of w stays. That is
what the thermostat is for, and all that one number can do: noise that is stronger in some coordinates than in others
is balanced on average only.

One step, with h = sqrt(eps), diffusion = h A, f = h xi = diffusion + z, c = exp(-f), n ~ N(0, 1):

    p <- c p - h (1 + c) / 2 ( n_beta grad L_batch(w) + gamma (w - w*) ) + sqrt(1 - exp(-2 diffusion)) n
    w <- w + h p
    z <- z + diffusion^2 ( |p|^2 / d - 1 )

It differs from the scheme of Ding et al., p <- (1 - f) p - h grad U + sqrt(2 diffusion) n, in two ways.
- Friction and noise are solved exactly, between two half kicks of the same gradient: a symmetric splitting (Leimkuhler
  & Shang, SIAM J. Sci. Comput. 38, 2016), up to where in its round a step begins. The bias is then of order h^2 = eps;
  theirs is of order h. On a Gaussian with precision P the covariance is t (P - eps/4 P^2)^-1, that of ``sgld`` up to
  the factor t, which makes tr(covariance P) equal to d at every eps (d large).
- mu = 1 / A^2, where they have mu = 1 in the unit of the weights. Nothing but eps has a unit then. xi scatters by
  A / sqrt(d), and z can rise by about diffusion^2 a step: a diffusion of 0.1 finds the friction that minibatch noise
  asks for in some hundred steps, one of 0.01 in ten thousand. Above 0.1 a handful of coordinates is sampled wrongly (at
  0.3 and d = 1 the variance is 2 % low); above 0.5 keep off.
With the friction at infinity the step is that of ``sgld`` with the same eps, and both are stable while eps is below
4 / (largest curvature of U). With a small friction, directions of small curvature are forgotten up to 2 / f times
sooner. In a step of ``sgld`` minibatch noise adds eps^2 / 4 of its variance to eps; here it is absorbed while that is
less than exp(-2 diffusion) eps, and beyond that z grows without end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from patterning_dist.models.components import Vector
from patterning_dist.sampling.posterior import Posterior


class State(NamedTuple):
    """What the next step needs.

    Attributes:
        position: w.
        momentum: p, dimensionless.
        thermostat: z, the friction of one step above ``diffusion``: 0 on average, or what minibatch noise asks for.
        step: number of steps taken; it addresses noise and minibatches.
    """

    position: Vector
    momentum: Vector
    thermostat: float
    step: int


def init(position: Vector) -> State:
    """A chain at rest at ``position``."""
    return State(position, {name: torch.zeros_like(w) for name, w in position.items()}, 0.0, 0)


def step_(
    state: State,
    gradient: Mapping[str, Tensor],
    noise: Mapping[str, Tensor],
    *,
    center: Mapping[str, Tensor],
    posterior: Posterior,
    step_size: float,
    diffusion: float,
    num_coordinates: int,
    total: Callable[[float], float] = float,
) -> State:
    """One step of the equations above; see ``samplers`` for the other arguments.

    Args:
        diffusion: the share of its momentum that a chain loses in a step, about; > 0.
        num_coordinates: d, of all ranks of the chain group.
        total: the sum of a number over these ranks; every rank calls it once a step.
    """
    kept = math.exp(-(diffusion + state.thermostat))
    h, spread = math.sqrt(step_size), math.sqrt(-math.expm1(-2 * diffusion))
    kinetic: Tensor | float = 0.0
    for name, w in state.position.items():
        score = posterior.negative_score(w, center[name], gradient[name])
        p = state.momentum[name] * kept
        p.add_(score, alpha=-h * (1 + kept) / 2).add_(noise[name], alpha=spread)
        w.copy_(w.add(p, alpha=h))
        state.momentum[name].copy_(p)
        # In float64, so that the sum is good to d = 1e9.
        kinetic = kinetic + p.square().sum(dtype=torch.float64)
    thermostat = state.thermostat + diffusion**2 * (total(float(kinetic)) / num_coordinates - 1)
    return State(state.position, state.momentum, thermostat, state.step + 1)
