"""Stochastic gradient Langevin dynamics (Welling & Teh, 2011), in the convention of Lau et al. (arXiv 2308.12108):

    w <- w - eps/2 ( n_beta grad L_batch(w) + gamma (w - w*) ) + sqrt(eps) xi ,     xi ~ N(0, 1)

Its stationary law is ``Posterior`` up to a bias of order eps (and of the minibatch noise). blackjax and posteriors put
eps where eps/2 stands here: their step size is half of this one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from patterning_dist.sampling.posterior import Posterior


class State(NamedTuple):
    """What the next step needs.

    Attributes:
        position: w, parameter name -> free coordinates, float32.
        step: number of steps taken; it addresses noise and minibatches.
    """

    position: dict[str, Tensor]
    step: int


def init(center: Mapping[str, Tensor]) -> State:
    """A chain starts at the checkpoint w*."""
    return State({name: tensor.detach().clone() for name, tensor in center.items()}, 0)


def step(
    state: State,
    gradient: Mapping[str, Tensor],
    noise: Mapping[str, Tensor],
    *,
    center: Mapping[str, Tensor],
    posterior: Posterior,
    step_size: float,
) -> State:
    """One step of the equation above; pure: the state passed in is left as it was.

    Args:
        state: before the step.
        gradient: of the minibatch loss at ``state.position``, nats per unit of weight.
        noise: N(0, 1), shaped like the position.
        center: w*.
        posterior: n_beta and gamma.
        step_size: eps, (unit of weight)^2.
    """
    score = posterior.negative_score(state.position, center, gradient)
    position = {
        name: w - 0.5 * step_size * score[name] + math.sqrt(step_size) * noise[name]
        for name, w in state.position.items()
    }
    return State(position, state.step + 1)
