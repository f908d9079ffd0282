"""Is the law that a chain samples the posterior? Its virial temperature, and what its steps add to the loss.

With U(w) = n_beta L(w) + gamma/2 |w - w*|^2, d coordinates and any L, integration by parts under p ~ exp(-U) gives

    T = E[ (w - w*) . grad U ] / d = 1 .

A minibatch gradient will do for grad U: given w it is unbiased, and it is the one that the step takes anyway. What T is
for the chains of each sampler:

- ``sgld``: |w - w*|^2 is the same after a step as before, on average, so that T = 1 + (eps/4) E|grad U_batch|^2 / d:
  above 1 by what the steps and the minibatches add to the posterior's variance.
- ``rmsprop_sgld``: the statement is about the law and not about the steps, so there is no preconditioner in it: T is 1
  if the law is ``Posterior``, and not if it leans to p(w) / G(w) or is heated by the steps.
- ``sgnht``: the thermostat holds the *mean* over all coordinates at 1 whatever the step size. T then says whether it
  has come to rest, and nothing of the bias: soft directions that are too cold make up for stiff ones that are too hot.

Below 1 the chain has not spread over its posterior yet.

The heat of the steps sits in stiff directions, a few of many, and drowns in the scatter of T where d is large. The same
integration by parts holds in every direction v_r, |v_r| = 1, by itself, so that along a few stiff ones

    T_stiff = mean over r of E[ v_r . (w - w*)  v_r . grad U ] = 1 ,

whichever they are and whatever the sampler: of ``sgnht`` it shows the bias that the thermostat hides in T.

For ``sgld`` and ``rmsprop_sgld`` the part of the heat that the loss sees is known with far less noise, from the same
balance of energy, with G the preconditioner (1 for ``sgld``):

    b = (eps/8) E[ n_beta grad L_batch . G grad U_batch ]   nats

is what n_beta E[L] is too large by, to first order in eps. On a Gaussian posterior it is exact at every eps without
minibatch noise, and with it where gamma is small beside n_beta H; elsewhere minibatch noise in flat directions, which
raises no loss, counts too. That a preconditioner leans to p(w) / G(w) is not in it: T shows that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patterning_dist.models.components import Vector
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.ranks import Ranks

NUM_BLOCKS = 32  # of consecutive steps, whose means tell the error of the mean over all of them


class Temperatures(NamedTuple):
    """T, b (nats) and T_stiff of consecutive blocks of the steps of a chain; empty where they are not known."""

    temperatures: list[float]
    step_biases: list[float]
    stiff_temperatures: list[float]


class Heat:
    """Sums of all three over the steps after burn-in, in blocks.

    Args:
        stiff: directions v_r, orthonormal, name of a piece -> [direction, *its shape]; None: none are known.
    """

    def __init__(self, stiff: Vector | None = None) -> None:
        self.stiff = stiff
        # Of (w - w*) . grad U and of n_beta grad L . G grad U, of this rank; and along the stiff ones, of all ranks.
        self.sums = torch.zeros(3, NUM_BLOCKS, dtype=torch.float64)

    def update(
        self,
        block: int,
        position: Vector,
        center: Vector,
        gradient: Mapping[str, Tensor],
        posterior: Posterior,
        preconditioner: Callable[[str], Tensor | None],
        ranks: Ranks,
    ) -> None:
        """Take in a step before it is taken; every rank does so.

        Args:
            block: that the step is in.
            position: w.
            center: w*.
            gradient: grad L of the step, nats per unit of weight.
            posterior: n_beta and gamma.
            preconditioner: name of a piece -> G; None: 1.
            ranks: of the chain group.
        """
        found, along = [], []
        for name, w in position.items():
            away, slope = w - center[name], posterior.negative_score(w, center[name], gradient[name])
            if self.stiff is not None:
                along.append(self.stiff[name].flatten(1) @ torch.stack([away.flatten(), slope.flatten()], dim=1))
            virial = away.mul_(slope).sum()  # pairwise: float32 is good to some 1e-6 of the sum
            if (scale := preconditioner(name)) is not None:
                slope.mul_(scale)
            heat = slope.mul_(gradient[name]).sum()
            found.append(torch.stack([virial, heat]).double())
        virial, heat = torch.stack(found).sum(dim=0).tolist()
        self.sums[0, block] += virial
        self.sums[1, block] += posterior.inverse_temperature * heat
        if along:
            both = ranks.sum(torch.stack(along).sum(dim=0).double().cpu())
            self.sums[2, block] += both.prod(dim=1).mean().item()

    def means(self, num_steps: int, ranks: Ranks, num_coordinates: int, step_size: float) -> Temperatures:
        """Of every block that ``num_steps`` steps reach; every rank calls this once all are taken."""
        counts = torch.bincount(block_of(torch.arange(num_steps), num_steps), minlength=NUM_BLOCKS)
        virial, heat = ranks.sum(self.sums[:2])[:, counts > 0] / counts[counts > 0]
        stiff = [] if self.stiff is None else (self.sums[2] / counts)[counts > 0].tolist()
        return Temperatures((virial / num_coordinates).tolist(), (step_size / 8 * heat).tolist(), stiff)


def block_of(step: Any, num_steps: int) -> Any:
    """The block that a step is in, of ``num_steps``."""
    return step * NUM_BLOCKS // num_steps
