"""Stochastic gradient Langevin dynamics (Welling & Teh, 2011), in the convention of Lau et al. (arXiv 2308.12108):

    w <- w - eps/2 ( n_beta grad L_batch(w) + gamma (w - w*) ) + sqrt(eps) xi ,     xi ~ N(0, 1)

Its stationary law is ``Posterior`` up to a bias of order eps. The minibatch adds its own noise: a gradient whose
n_beta grad L_batch has variance v turns the noise eps into eps + eps^2 v / 4. blackjax and posteriors put eps where
eps/2 stands here: their step size is half of this one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from patterning_dist.models.components import Vector
from patterning_dist.sampling.posterior import Posterior


class State(NamedTuple):
    """What the next step needs.

    Attributes:
        position: w.
        step: number of steps taken; it addresses noise and minibatches.
    """

    position: Vector
    step: int


def init(position: Vector) -> State:
    """A chain at ``position``, whose tensors it holds as they are: ``step_`` overwrites them."""
    return State(position, 0)


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
        noise: xi, shaped like the position.
        center: w*.
        posterior: n_beta and gamma.
        step_size: eps, (unit of weight)^2.
    """
    position = {}
    for name, w in state.position.items():
        score = posterior.negative_score(w, center[name], gradient[name])
        position[name] = w.add(score, alpha=-0.5 * step_size).add_(noise[name], alpha=math.sqrt(step_size))
    return State(position, state.step + 1)


def step_(state: State, gradient: Mapping[str, Tensor], noise: Mapping[str, Tensor], **settings: Any) -> State:
    """``step``, bit for bit, but over the tensors of ``state``, with temporaries of one piece at a time."""
    for name, w in state.position.items():
        w.copy_(step(State({name: w}, state.step), gradient, noise, **settings).position[name])
    return State(state.position, state.step + 1)
