"""One posterior chain: SGLD steps, and every so often a draw at which all losses of the probe are measured.

A chain is a deterministic function of (settings, chain number): its minibatches and noise are addressed by step, so the
state below is all that a restart needs. There is no Ray here.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patterning_dist.data.sampler import minibatch
from patterning_dist.sampling import sgld
from patterning_dist.sampling.noise import standard_normal
from patterning_dist.sampling.observables import SplitLosses
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.restricted import RestrictedModel

# A chain further from w* than this many prior radii has left the neighbourhood: under the localisation alone
# gamma |w - w*|^2 is chi-squared with d degrees of freedom, mean d.
_MAX_PRIOR_RADII_SQUARED = 25.0


@dataclass(frozen=True)
class ChainSettings:
    """Where a chain goes and how it walks.

    Attributes:
        posterior: n_beta and gamma.
        step_size: eps, (unit of weight)^2.
        batch_size: sequences a minibatch.
        burn_in: SGLD steps before the first draw.
        num_draws: draws recorded.
        steps_between_draws: SGLD steps from one draw to the next.
        seed: of the whole run; chains of different components differ all the same.
    """

    posterior: Posterior
    step_size: float
    batch_size: int
    burn_in: int
    num_draws: int
    steps_between_draws: int
    seed: int


@dataclass(frozen=True)
class Draw:
    """What one draw measured: deviations from the centre w*, in nats.

    ``observables`` [observable] float64; ``losses`` [probe column] float64: every probe token, then the mean of every
    probe sequence; ``mean_loss`` L(w) - L(w*) over the probe tokens.
    """

    number: int
    observables: np.ndarray
    losses: np.ndarray
    mean_loss: float


class ChainFailure(Exception):
    """A chain that must be left out; the message says what happened, at which step, and which key to turn."""


class Chain:
    """A resumable chain on one component.

    Args:
        model: restricted to the component, at w*.
        settings: see ``ChainSettings``.
        number: of the chain, from 0.
        population: number of training sequences.
        training_tokens: sequence ids -> token ids [sequence, position].
        probe: token ids of the samples whose losses are recorded [sequence, position].
        splits: split losses; ``component_losses`` of them come first in ``Draw.observables``.
        num_component_losses: how many observables are the probe's mean loss itself.
        functions: the user's observables.
        accumulate_gradients: also sum w and grad phi of the split losses over the draws (for the response direction).
    """

    def __init__(
        self,
        model: RestrictedModel,
        settings: ChainSettings,
        number: int,
        *,
        population: int,
        training_tokens: Callable[[np.ndarray], np.ndarray],
        probe: Tensor,
        splits: SplitLosses,
        num_component_losses: int = 0,
        functions: tuple[Callable[[torch.nn.Module], Tensor], ...] = (),
        accumulate_gradients: bool = False,
    ) -> None:
        self.model, self.settings, self.number = model, settings, number
        self.population, self.training_tokens = population, training_tokens
        self.splits, self.num_component_losses, self.functions = splits, num_component_losses, functions
        # Chains of different components must not share noise or minibatches: that would correlate their errors.
        self.seed = zlib.crc32(f"{settings.seed}/{model.component.name}".encode())
        self.device = probe.device
        self.probe = model.freeze(probe)
        self.held_out = model.freeze(splits.tokens.to(self.device)) if len(splits.names) else None
        self.coefficients = splits.coefficients.to(self.device)
        self.state = sgld.init(model.center)
        self.num_draws = 0
        self.sums = None
        if accumulate_gradients:
            self.sums = torch.zeros(1 + len(splits.names), self._flat(model.center).numel(), dtype=torch.float64)
        self._center_observables, self._center_losses = self._evaluate()
        self.center_losses = self._center_losses.numpy()

    def draws(self) -> Iterator[Draw]:
        """Yield the draws that are still to come.

        Raises:
            ChainFailure: a loss or weight is not finite, or the chain has left the neighbourhood of w*.
        """
        settings = self.settings
        while self.num_draws < settings.num_draws:
            wanted = settings.burn_in + self.num_draws * settings.steps_between_draws
            while self.state.step < wanted:
                self._step()
            yield self._draw()

    def state_dict(self) -> dict[str, object]:
        """All that ``load_state_dict`` needs to go on, bit for bit."""
        return {
            "position": self.state.position,
            "step": self.state.step,
            "num_draws": self.num_draws,
            "sums": None if self.sums is None else self.sums.clone(),  # summed up in place
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from ``state_dict()`` of a chain built with the same arguments."""
        self.state = sgld.State({n: w.clone() for n, w in state["position"].items()}, state["step"])
        self.num_draws = state["num_draws"]
        self.sums = None if state["sums"] is None else state["sums"].clone()

    def _step(self) -> None:
        settings, step = self.settings, self.state.step
        ids = minibatch(self.seed, self.number, step, settings.batch_size, self.population)
        self.model.place(self.state.position)
        loss, gradient = self.model.mean_loss_gradient(torch.from_numpy(self.training_tokens(ids)).to(self.device))
        if not math.isfinite(loss):
            raise ChainFailure(
                f"the loss became {loss} at step {step}; lower sampling.step_size ({settings.step_size:g})"
            )
        self.state = sgld.step(
            self.state,
            gradient,
            standard_normal(self.seed, self.number, step, self.state.position),
            center=self.model.center,
            posterior=settings.posterior,
            step_size=settings.step_size,
        )

    def _draw(self) -> Draw:
        self._check_radius()
        self.model.place(self.state.position)
        observables, losses = self._evaluate()
        observables, losses = observables - self._center_observables, losses - self._center_losses
        if not (torch.isfinite(losses).all() and torch.isfinite(observables).all()):
            raise ChainFailure(
                f"a loss or observable is not finite at draw {self.num_draws} (step {self.state.step}); "
                f"lower sampling.step_size ({self.settings.step_size:g})"
            )
        if self.sums is not None:
            gradients = self.model.gradients(self.held_out, self.coefficients)
            self.sums += torch.stack([self._flat(v) for v in (self.state.position, *gradients)])
        draw = Draw(self.num_draws, observables.numpy(), losses.numpy(), losses[: self._num_tokens].mean().item())
        self.num_draws += 1
        return draw

    def _check_radius(self) -> None:
        distance = sum(((w - self.model.center[n]) ** 2).sum().item() for n, w in self.state.position.items())
        num_coordinates = sum(w.numel() for w in self.state.position.values())
        radii_squared = self.settings.posterior.localization * distance / num_coordinates
        if not radii_squared < _MAX_PRIOR_RADII_SQUARED:  # catches NaN as well
            raise ChainFailure(
                f"the weights left the neighbourhood of the checkpoint by step {self.state.step} "
                f"(gamma |w - w*|^2 / d = {radii_squared:.3g}, expected about 1 or less); "
                f"lower sampling.step_size ({self.settings.step_size:g}) or raise sampling.localization"
            )

    def _evaluate(self) -> tuple[Tensor, Tensor]:
        """(observables, probe losses: tokens then sequence means), absolute, float64 on the CPU."""
        probe = self.model.losses(self.probe).double().cpu()
        self._num_tokens = probe.numel()
        columns = [probe.mean().expand(self.num_component_losses)]
        if self.held_out is not None:
            held_out = self.model.losses(self.held_out).double().cpu()
            columns.append((self.splits.coefficients.double().cpu() * held_out).sum(dim=(1, 2)))
        with torch.no_grad():
            columns += [f(self.model.model).double().cpu().reshape(-1) for f in self.functions]
        return torch.cat(columns), torch.cat([probe.flatten(), probe.mean(dim=1)])

    @staticmethod
    def _flat(tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([t.double().cpu().flatten() for t in tensors.values()])
