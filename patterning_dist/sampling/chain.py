"""One posterior chain: sampler steps, and every so often a draw at which all losses of the probe are measured.

A chain is a deterministic function of (settings, chain number): its minibatches and noise are addressed by step, so the
state below is all that a restart needs, and the layout of the model over ranks does not matter. There is no Ray here.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from patterning_dist.data.sampler import distinct_minibatch, permutation
from patterning_dist.heartbeat import inside
from patterning_dist.models.components import Vector
from patterning_dist.sampling.lanczos import SpectrumEnds, spectrum_ends
from patterning_dist.sampling.noise import Noise
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.samplers import Sampler
from patterning_dist.sampling.statistics import Draw, Statistic
from patterning_dist.sampling.target import Target
from patterning_dist.sampling.temperature import Heat, Temperatures, block_of

# A chain further from w* than this many prior radii has left the neighbourhood: under the localisation alone
# gamma |w - w*|^2 is chi-squared with d degrees of freedom, mean d.
_MAX_PRIOR_RADII_SQUARED = 25.0

# Samples that Hessian products are taken on, and what they are drawn by; streams of chains are small numbers.
_LANCZOS_SAMPLES, _LANCZOS_STREAM = 64, 0x6C616E637A6F73

Gradient = Literal["minibatch", "control_variate", "full"]


@dataclass(frozen=True)
class ChainSettings:
    """Where a chain goes and how it walks.

    Attributes:
        posterior: n_beta and gamma.
        step_size: eps, (unit of weight)^2.
        batch_size: samples a minibatch, drawn without replacement: all of them give the exact gradient.
        burn_in: steps before the first draw.
        num_draws: draws recorded.
        steps_between_draws: steps from one draw to the next.
        seed: of the whole run; chains of different components differ all the same.
        sampler: the update rule.
        gradient: what stands for the gradient of the mean loss L over the training samples in a step:

            - ``minibatch``: g_B(w), that of a minibatch.
            - ``control_variate``: g_B(w) - g_B(w*) + g(w*) (Baker, Fearnhead, Fox & Nemeth, Statistics and Computing
              29, 2019), g(w*) the exact gradient at the checkpoint: unbiased, with noise that vanishes at w*, and
              everywhere if all samples have the same Hessian. A step costs two minibatch gradients, and a chain one
              pass over the training samples, again when it is resumed.
            - ``full``: g(w), a pass over all training samples every step; ``batch_size`` bears on nothing.
        lanczos_steps: Hessian products from which every chain takes the ends of the spectrum at w*, and the stiff
            directions that its temperature is measured along; 0: none.
    """

    posterior: Posterior
    step_size: float
    batch_size: int
    burn_in: int
    num_draws: int
    steps_between_draws: int
    seed: int
    sampler: Sampler = field(default_factory=Sampler)
    gradient: Gradient = "minibatch"
    lanczos_steps: int = 0


class ChainFailure(Exception):
    """A chain that must be left out; the message says what happened, at which step, and which key to turn."""


class Chain:
    """A resumable chain on one component. On a chain group every rank runs one over its part of the model.

    Args:
        target: restricted to the component, at w*.
        settings: see ``ChainSettings``.
        number: of the chain, from 0.
        population: number of training samples.
        statistics: by name; each is handed every draw.

    Attributes:
        spectrum: ends of the spectrum of n_beta H + gamma at w*, where ``lanczos_steps`` asks for them.
    """

    def __init__(
        self,
        target: Target,
        settings: ChainSettings,
        number: int,
        *,
        population: int,
        statistics: Mapping[str, Statistic] | None = None,
    ) -> None:
        self.target, self.settings, self.number, self.population = target, settings, number, population
        self.statistics = dict(statistics or {})
        # Chains of different components must not share noise or minibatches: that would correlate their errors.
        self.seed = zlib.crc32(f"{settings.seed}/{target.name}".encode())
        self._sign_seed = zlib.crc32(f"{settings.seed}/{target.name}/signs".encode())
        self.num_coordinates = sum(target.totals.values())
        self._sampler = settings.sampler.module
        self.state = self._sampler.init(target.live())
        self.num_draws = 0
        self.spectrum: SpectrumEnds | None = None
        stiff: Vector | None = None
        if settings.lanczos_steps:
            ids = permutation(self.seed, _LANCZOS_STREAM, population)[:_LANCZOS_SAMPLES]
            samples, num_products = target.prepare(target.data, ids), settings.lanczos_steps
            self.spectrum, stiff = spectrum_ends(target, settings.posterior, samples, num_products, self._sign_seed)
        self.heat = Heat(stiff)
        self._center_gradient: Vector | None = None
        if settings.gradient == "control_variate":
            self._center_gradient = target.gradient(np.arange(population))[1]
        self._center = target.measure()
        self.center_losses, self.center_mean_loss = self._center.losses.numpy(), self._center.mean_loss

    def draws(self) -> Iterator[Draw]:
        """Yield the draws that are still to come.

        Raises:
            ChainFailure: a loss or weight is not finite, or the chain has left the neighbourhood of w*.
        """
        settings = self.settings
        while self.num_draws < settings.num_draws:
            wanted = settings.burn_in + self.num_draws * settings.steps_between_draws
            with inside(f"draw {self.num_draws}"):
                while self.state.step < wanted:
                    self._step()
                draw = self._draw()
                for name, statistic in self.statistics.items():
                    with inside(f"statistic {name}"):
                        statistic.update(draw, self.target)
            yield draw

    def temperatures(self) -> Temperatures:
        """Virial temperatures of blocks of steps, and what the steps add to the LLC; see ``sampling.temperature``.

        The thermostat of ``sgnht`` hides the latter. Every rank calls this, once all draws are made.
        """
        steps, settings = self._steps_of_draws, self.settings
        found = self.heat.means(steps, self.target.ranks, self.num_coordinates, settings.step_size)
        return found._replace(step_biases=[]) if settings.sampler.kind == "sgnht" else found

    @property
    def _steps_of_draws(self) -> int:
        """Steps after burn-in."""
        return (self.settings.num_draws - 1) * self.settings.steps_between_draws

    def state_dict(self) -> dict[str, Any]:
        """All that ``load_state_dict`` needs to go on, bit for bit; of this rank."""
        return {
            "sampler": {name: self._copy(value) for name, value in self.state._asdict().items()},
            "num_draws": self.num_draws,
            "heat": self.heat.sums.clone(),
            "statistics": {name: statistic.state_dict() for name, statistic in self.statistics.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict()`` of a chain built with the same arguments."""
        live = self.state.position
        for name, w in state["sampler"]["position"].items():
            live[name].copy_(w)
        self.state = self._sampler.State(**{n: self._copy(v) for n, v in state["sampler"].items()} | {"position": live})
        self.num_draws = state["num_draws"]
        self.heat.sums.copy_(state["heat"])
        for name, statistic in self.statistics.items():
            statistic.load_state_dict(state["statistics"][name])

    def _step(self) -> None:
        settings, step = self.settings, self.state.step
        ids = np.arange(self.population)
        if settings.gradient != "full":
            ids = distinct_minibatch(self.seed, self.number, step, settings.batch_size, self.population)
        loss, gradient = self._gradient(ids)
        if not math.isfinite(loss):
            raise ChainFailure(
                f"the loss became {loss} at step {step}; lower sampling.step_size ({settings.step_size:g})"
            )
        if step >= settings.burn_in:
            block = block_of(step - settings.burn_in, self._steps_of_draws)
            scale = partial(settings.sampler.preconditioner, self.state)
            where, center, ranks = self.state.position, self.target.center, self.target.ranks
            self.heat.update(block, where, center, gradient, settings.posterior, scale, ranks)
        options: dict[str, Any] = dict(settings.sampler.options)
        if options.get("correction"):
            options["curvature"] = self._curvature(ids)
        if settings.sampler.kind == "sgnht":
            options |= {"num_coordinates": self.num_coordinates, "total": self._total}
        self.state = self._sampler.step_(
            self.state,
            gradient,
            self._noise(self.seed, step),
            center=self.target.center,
            posterior=settings.posterior,
            step_size=settings.step_size,
            **options,
        )

    def _gradient(self, ids: np.ndarray) -> tuple[float, Vector]:
        """Mean loss of the samples, and what stands for the gradient of L."""
        if self._center_gradient is None:
            return self.target.gradient(ids)
        loss, here, there = self.target.gradient_here_and_at_center(ids)
        return loss, {name: g.sub_(there[name]).add_(self._center_gradient[name]) for name, g in here.items()}

    def _copy(self, value: Any) -> Any:
        """A field of a sampler's state: the tensors of a dict copied, on this chain's device."""
        if not isinstance(value, dict):
            return value
        return {name: tensor.to(self.target.device, copy=True) for name, tensor in value.items()}

    def _noise(self, seed: int, step: int) -> Noise:
        target = self.target
        shapes = {name: tuple(w.shape) for name, w in target.center.items()}
        return Noise(seed, self.number, step, target.extents, shapes, target.device)

    def _total(self, value: float) -> float:
        return self.target.ranks.sum(torch.tensor(value, dtype=torch.float64)).item()

    def _curvature(self, ids: np.ndarray) -> Vector:
        """Diagonal of the minibatch Hessian by one random sign vector z, z * (H z) (Hutchinson, 1990).

        H z is a central difference of gradients over the length of one step of noise, sqrt(eps): it needs nothing of a
        model but its gradient.
        """
        live, length = self.state.position, math.sqrt(self.settings.step_size)
        signs = {name: torch.sign(z) for name, z in self._noise(self._sign_seed, self.state.step).items()}
        kept, sides = {name: w.clone() for name, w in live.items()}, []
        for side in (length, -length):
            for name, w in live.items():
                w.copy_(kept[name] + side * signs[name])
            sides.append(self.target.gradient(ids)[1])
        for name, w in live.items():
            w.copy_(kept[name])
        return {name: z * (sides[0][name] - sides[1][name]) / (2 * length) for name, z in signs.items()}

    def _draw(self) -> Draw:
        self._check_radius()
        measured = self.target.measure()
        observables = measured.observables - self._center.observables
        losses = measured.losses - self._center.losses
        if not (torch.isfinite(losses).all() and torch.isfinite(observables).all()):
            raise ChainFailure(
                f"a loss or observable is not finite at draw {self.num_draws} (step {self.state.step}); "
                f"lower sampling.step_size ({self.settings.step_size:g})"
            )
        mean_loss = measured.mean_loss - self._center.mean_loss
        draw = Draw(self.num_draws, observables.numpy(), losses.numpy(), mean_loss)
        self.num_draws += 1
        return draw

    def _check_radius(self) -> None:
        squared = sum(
            torch.linalg.vector_norm(w - self.target.center[name], dtype=torch.float64).item() ** 2
            for name, w in self.state.position.items()
        )
        radii_squared = self.settings.posterior.localization * self._total(squared) / self.num_coordinates
        if not radii_squared < _MAX_PRIOR_RADII_SQUARED:  # catches NaN as well
            raise ChainFailure(
                f"the weights left the neighbourhood of the checkpoint by step {self.state.step} "
                f"(gamma |w - w*|^2 / d = {radii_squared:.3g}, expected about 1 or less); "
                f"lower sampling.step_size ({self.settings.step_size:g}) or raise sampling.localization"
            )
