"""SGLD preconditioned by RMSprop: pSGLD (Li et al., AAAI 2016, arXiv 1512.07666), in the convention of ``sgld``:

    V <- V + a (g^2 - V) ,    a = (1 - decay) / (1 - decay^t) ,    G = 1 / ( sqrt(V) + stability )
    w <- w - eps/2 ( G ( n_beta g + gamma (w - w*) ) - Gamma ) + sqrt(eps G) xi ,     xi ~ N(0, 1)

element by element, g = grad L_batch(w) *not* scaled by n_beta, t the number of this step from 1, and

    Gamma_i = dG_i / dw_i = -a G_i^2 g_i H_ii / sqrt(V_i) ,     H_ii = d g_i / d w_i .

V is the mean of g^2 over the steps so far, weighted by decay^age: Li et al.'s recursion with Adam's correction of the
start, so that after the first step V = g^2. With decay = 1, a = 1/t, all steps weigh the same.

The stationary law is ``Posterior``, up to a bias of order eps, as far as G does not follow w. How far it does:
- By default Gamma is left out (``correction=False``, as in Li et al.'s experiments and in devinterp): it is of order
  1 - decay, and the diagonal of the Hessian costs gradients at every step. For decay = 0 the law is then p(w) / G(w)
  instead of p(w); with Gamma it is p(w).
- Gamma sees the present gradient alone, while V remembers 1 / (1 - decay) steps. Where V is mostly the variance of the
  minibatch gradient, or the square of a mean gradient, it hardly depends on w: nothing is lost. Where the curvature
  dominates (large batches at a minimum) and the chain needs longer than 1 / (1 - decay) steps to forget its place, V
  follows w, and the law leans to p(w) / G(w) at every eps, with Gamma or without it. decay = 1 mends that: the
  preconditioner comes to rest (diminishing adaptation, Roberts & Rosenthal 2007).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patterning_dist.models.components import Vector
from patterning_dist.sampling.posterior import Posterior


class State(NamedTuple):
    """w, V, and the number of steps taken."""

    position: Vector
    second_moment: Vector
    step: int


def init(position: Vector) -> State:
    """A chain at ``position``."""
    return State(position, {name: torch.zeros_like(w) for name, w in position.items()}, 0)


def preconditioner(state: State, name: str, *, stability: float, **options: Any) -> Tensor:
    """G of a piece, as far as it is known before the gradient of the step: of the V of the steps so far."""
    return (state.second_moment[name].sqrt() + stability).reciprocal_()


def step_(
    state: State,
    gradient: Mapping[str, Tensor],
    noise: Mapping[str, Tensor],
    *,
    center: Mapping[str, Tensor],
    posterior: Posterior,
    step_size: float,
    decay: float,
    stability: float,
    correction: bool = False,
    curvature: Mapping[str, Tensor] | None = None,
) -> State:
    """One step of the equations above; see ``samplers`` for the other arguments.

    Args:
        step_size: eps, in (unit of weight)^2 times the unit of g: eps G is what eps is for ``sgld``.
        decay: of the weights in V, in [0, 1].
        stability: added to sqrt(V), > 0, in the unit of g: a coordinate without gradient has G = 1 / stability.
        correction: whether Gamma is in the drift.
        curvature: H_ii of the same loss at the same place, shaped like the position; needed for ``correction`` only.

    Raises:
        ValueError: ``correction`` without ``curvature``.
    """
    if correction and curvature is None:
        raise ValueError("correction=True needs curvature, the diagonal of the Hessian of the minibatch loss")
    fraction = (1 - decay) / (1 - decay ** (state.step + 1)) if decay < 1 else 1 / (state.step + 1)
    for name, w in state.position.items():
        g = gradient[name]
        second_moment = state.second_moment[name].lerp(g.square(), fraction)
        root = second_moment.sqrt()
        scale = (root + stability).reciprocal_()
        drift = posterior.negative_score(w, center[name], g).mul_(scale)
        if correction and curvature is not None:
            # V = 0 only where g = 0: Gamma is zero there, not 0 / 0.
            slope = g * curvature[name] / root.clamp_min_(torch.finfo(root.dtype).tiny)
            drift.addcmul_(slope, scale.square(), value=fraction)
        moved = w.add(drift, alpha=-0.5 * step_size)
        w.copy_(moved.addcmul_(noise[name], scale.mul_(step_size).sqrt_()))
        state.second_moment[name].copy_(second_moment)
    return State(state.position, state.second_moment, state.step + 1)
