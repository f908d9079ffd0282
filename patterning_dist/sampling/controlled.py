"""Susceptibilities with a control: the covariance that a chain has to measure, less one that is known.

For any posterior p ~ exp(-U), U = n_beta L + gamma/2 |w - w*|^2, and any fixed vector v, integration by parts gives
E[ v . grad U f ] = E[ v . grad f ] (Stein, 1972; as a control variate: Oates, Girolami & Chopin, 2017), so that

    chi_i = -Cov(phi, l_i - L) = -Cov(phi - z, l_i - L) - E[ v . grad (l_i - L) ] ,     z = v . grad U

What is left to a covariance is small where z goes with phi, as it does with v = (n_beta H + gamma I)^-1 grad phi(w*);
what is given back is a mean of derivatives, which few draws know well. The controls:

- ``langevin_stein``: z as above. Exact, whatever the posterior and however v was come by. In z stands g_B(w) - g_B(w*)
  for grad L, of a minibatch B that is drawn for this alone. Given all draws of the chain it has the mean
  grad L(w) - grad L(w*), so that E[z l_i] is that of the exact gradient but for v . grad L(w*), a constant, which no
  covariance sees: minibatches cost noise, and no bias.
- ``linear``: z = grad phi(w*) . (w - w*), the linear part of phi: a dot product, no gradient and no minibatch. What is
  given back is then Cov(z, l_i - L) for a Gaussian posterior of covariance (n_beta H + gamma I)^-1 only. It is off by
  what is not Gaussian, by H being of a part of the training samples, and by the residual of conjugate gradients: hold
  it against the plain covariance (``response.reliability.bootstrap_slope``) or ``langevin_stein``.

A small minibatch can make z noisier than phi. So b z is taken instead, and b times what is given back: every half of a
chain has the b of least Var(phi - b z) over the draws of the other half, of which its own are independent but for those
at the border. Whatever b is, ``langevin_stein`` stays exact.

A chain whose steps make it too hot has too large a Cov(phi, l_i). What of it goes with z is not taken from the chain:
on a Gaussian posterior the linear part of phi loses the bias of the step with the noise.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from patterning_dist.data.sampler import distinct_minibatch, permutation
from patterning_dist.models.components import Vector
from patterning_dist.response.moments import CoMoments
from patterning_dist.sampling.chain import ChainSettings
from patterning_dist.sampling.direction import directional_losses, response_direction
from patterning_dist.sampling.statistics import Draw
from patterning_dist.sampling.target import Target

Control = Literal["langevin_stein", "linear"]

# Training samples that Hessian products are taken on, their number, and the relative residual at which they end.
_HESSIAN_SAMPLES, _MAX_PRODUCTS, _TOLERANCE = 256, 30, 0.01
_HESSIAN_STREAM = 0x636F6E74726F6C
# Losses are differenced over +- this many standard deviations of the posterior, of v . w: v / sqrt(v . P v).
_STEP = 0.1
# Derivatives are a mean and no covariance, so that a part of the draws knows them well enough: every so many of them.
_SLOPE_EVERY = 4
# Gradients of a sample that conjugate gradients take at most, and passes over the probe a draw; of every row.
CONTROL_COST = 2 * _HESSIAN_SAMPLES * _MAX_PRODUCTS, 2 / _SLOPE_EVERY
_OWN = ("trace", "slopes", "num_slopes")  # arrays of the state beside the moments


class Controlled:
    """A ``Statistic``: co-moments of controlled observables with the probe losses, for ``susceptibility``.

    On a chain group every rank has one, with its part of the vectors; the first keeps the moments.

    Args:
        target: at w*.
        settings: of the chain.
        number: of the chain.
        population: number of training samples.
        controls: number of the observable, in the order of ``Draw.observables``, and its control, for every row.
        num_batches: of consecutive draws, for batch means.
    """

    def __init__(
        self,
        target: Target,
        settings: ChainSettings,
        number: int,
        *,
        population: int,
        controls: Sequence[tuple[int, Control]],
        num_batches: int,
    ) -> None:
        self.settings, self.number, self.population = settings, number, population
        self.rows, self.kinds = [row for row, _ in controls], [kind for _, kind in controls]
        self.seed = zlib.crc32(f"{settings.seed}/{target.name}/controls".encode())
        ids = permutation(self.seed, _HESSIAN_STREAM, population)[:_HESSIAN_SAMPLES]
        samples = target.prepare(target.data, ids)
        self.gradients = [target.observable_gradient(row) for row in self.rows]
        self.directions = [
            response_direction(
                target, settings.posterior, g, samples, max_iterations=_MAX_PRODUCTS, tolerance=_TOLERANCE
            ).vector
            for g in self.gradients
        ]
        # sqrt(v . P v) of v = P^-1 g, and 0 of a v that conjugate gradients could not begin with: no control is taken.
        self.lengths = [max(target.dot(g, v), 0.0) ** 0.5 for g, v in zip(self.gradients, self.directions, strict=True)]
        with torch.no_grad():
            num_columns = len(target.columns(target.losses(target.probe))[0]) + 1  # a pass of all ranks
        num_columns = num_columns if target.ranks.rank == 0 else 0
        # Of phi, then of z; both of every draw; and sums of derivatives in every batch.
        self.moments = CoMoments.empty(number, settings.num_draws, 2 * len(self.rows), num_columns, num_batches)
        self.trace = np.zeros((settings.num_draws, 2 * len(self.rows)))
        self.slopes = np.zeros((num_batches, len(self.rows), num_columns))
        self.num_slopes = np.zeros(num_batches, np.int64)

    def update(self, draw: Draw, target: Target) -> None:
        """Take in z, and where they are due the derivatives, two passes over the probe a row."""
        position = {name: w.clone() for name, w in target.live().items()}
        self.trace[draw.number] = both = np.append(draw.observables[self.rows], self._z(draw, target, position))
        num_columns = self.moments.mean_loss.shape[1]
        losses = np.append(draw.losses, draw.mean_loss)[:num_columns]
        batch = draw.number * len(self.num_slopes) // self.settings.num_draws
        if draw.number % _SLOPE_EVERY == 0 or not self.num_slopes[batch]:
            self.num_slopes[batch] += 1
            for k, (v, length) in enumerate(zip(self.directions, self.lengths, strict=True)):
                step = _STEP / (length or 1.0) * target.dot(v, v) ** 0.5
                slopes, mean = target.columns(-directional_losses(target, target.probe, position, v, step=step))
                self.slopes[batch, k] += np.append(slopes.numpy(), mean)[:num_columns]
        self.moments.update(both[None], losses[None])

    def state_dict(self) -> dict[str, Tensor]:
        """Moments, draws of phi and z, and sums of derivatives."""
        arrays = self.moments.state_dict() | {name: getattr(self, name) for name in _OWN}
        return {name: torch.from_numpy(array).clone() for name, array in arrays.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        arrays = {name: tensor.clone().numpy() for name, tensor in state.items()}
        self.trace, self.slopes, self.num_slopes = (arrays.pop(name) for name in _OWN)
        self.moments = CoMoments.from_state_dict(arrays)

    def flush(self) -> None:
        """Nothing is written on the way."""

    def result(self) -> dict[str, np.ndarray] | None:
        """The ``CoMoments`` of phi - b z, with what is given back among the products; the last column is the loss L."""
        moments, num_rows = self.moments, len(self.rows)
        if not moments.mean_loss.shape[1]:
            return None
        batch = np.arange(len(self.trace)) * len(moments.count) // len(self.trace)
        phi, z = np.split(self.trace - self.trace.mean(axis=0), 2, axis=1)
        b = np.zeros((len(moments.count), num_rows))
        halves = np.arange(len(b)) < len(b) // 2
        for half in (halves, ~halves):
            other = ~half[batch]
            b[half] = _slopes(z[other], phi[other])
        left = phi - b[batch] * z
        given_back = self.slopes * (moments.count / self.num_slopes)[:, None, None]
        products = np.split(moments.comoment, 2, axis=1)
        controlled = CoMoments.empty(self.number, len(left), num_rows, moments.mean_loss.shape[1], len(b))
        controlled.update(left, np.zeros((len(left), moments.mean_loss.shape[1])))
        found = controlled.state_dict() | {"mean_loss": moments.mean_loss, "m2_loss": moments.m2_loss}
        return found | {"comoment": products[0] - b[:, :, None] * (products[1] - given_back)}

    def _z(self, draw: Draw, target: Target, position: Vector) -> list[float]:
        """z of every row."""
        away, score = {name: w - target.center[name] for name, w in position.items()}, None
        if "langevin_stein" in self.kinds:
            settings = self.settings
            # As many samples as the steps from draw to draw have: for less noise, and a cost that at most doubles.
            size = settings.batch_size * settings.steps_between_draws
            size = self.population if settings.gradient == "full" else size
            ids = distinct_minibatch(self.seed, self.number, draw.number, size, self.population)
            _, here, there = target.gradient_here_and_at_center(ids)
            posterior = settings.posterior
            score = {n: posterior.negative_score(w, target.center[n], here[n] - there[n]) for n, w in position.items()}
        return [
            target.dot(g, away) if score is None or kind == "linear" else target.dot(v, score)
            for kind, g, v in zip(self.kinds, self.gradients, self.directions, strict=True)
        ]


def _slopes(z: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """Least squares of phi on z, row by row, 0 where z does not vary [draw, row] -> [row]."""
    z, phi = z - z.mean(axis=0), phi - phi.mean(axis=0)
    squares = (z**2).sum(axis=0)
    return np.divide((z * phi).sum(axis=0), squares, out=np.zeros(z.shape[1]), where=squares > 0)
