"""Stochastic gradient Langevin dynamics (Welling & Teh, 2011), in the convention of Lau et al. (arXiv 2308.12108):

    w <- w - eps/2 ( n_beta grad L_batch(w) + gamma (w - w*) ) + sqrt(eps) xi ,     xi ~ N(0, 1)

Its stationary law is ``Posterior`` up to a bias of order eps. The minibatch adds its own noise: a gradient whose
n_beta grad L_batch has variance v turns the noise eps into eps + eps^2 v / 4. blackjax and posteriors put eps where
eps/2 stands here: their step size is half of this one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from patterning_dist.models.components import Vector
from patterning_dist.sampling.posterior import Posterior


class State(NamedTuple):
    """w, and the number of steps taken."""

    position: Vector
    step: int


def init(position: Vector) -> State:
    """A chain at ``position``."""
    return State(position, 0)


def step_(
    state: State,
    gradient: Mapping[str, Tensor],
    noise: Mapping[str, Tensor],
    *,
    center: Mapping[str, Tensor],
    posterior: Posterior,
    step_size: float,
) -> State:
    """One step of the equation above; see ``samplers`` for the arguments.

    Examples:
        >>> state, zero = init({"w": torch.tensor([1.0])}), {"w": torch.tensor([0.0])}
        >>> settings = {"center": zero, "posterior": Posterior(10.0, 0.0), "step_size": 0.01}
        >>> step_(state, {"w": torch.tensor([2.0])}, zero, **settings).position["w"]  # 1 - 0.01 / 2 * 10 * 2
        tensor([0.9000])
    """
    for name, w in state.position.items():
        score = posterior.negative_score(w, center[name], gradient[name])
        w.copy_(w.add(score, alpha=-0.5 * step_size).add_(noise[name], alpha=math.sqrt(step_size)))
    return State(state.position, state.step + 1)
