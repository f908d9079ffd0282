"""Which step size, temperature and localisation to sample with: a few short chains at every setting, judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patterning_dist.response.diagnostics import observable_diagnostics
from patterning_dist.response.llc import TraceMean, llc, trace_mean
from patterning_dist.response.reliability import split_half_reliability
from patterning_dist.response.run_length import Signal, signal
from patterning_dist.response.usable import DIVERGED, unusable

Floats = NDArray[np.floating]

_UNKNOWN = TraceMean(np.nan, np.nan, np.nan)
# The plateau counts as reached this share below it, where noise does not hide that.
_PLATEAU_TOLERANCE = 0.05


class Setting(NamedTuple):
    """What a trial is run with: eps, n_beta and gamma."""

    step_size: float
    inverse_temperature: float
    localization: float

    @property
    def posterior(self) -> tuple[float, float]:
        """(n_beta, gamma): what is estimated, however fast."""
        return self.inverse_temperature, self.localization

    @property
    def words(self) -> str:
        """The setting in the names of the configuration."""
        return (
            f"inverse_temperature {self.inverse_temperature:g}, localization {self.localization:g}, "
            f"step_size {self.step_size:g}"
        )


@dataclass(frozen=True)
class Trial:
    """One chain of a setting, from the checkpoint on.

    Attributes:
        mean_loss: [draw] L(w) - L(w*) over the probe, nats; the first draw is w* itself.
        observables: [draw, observable] deviations from w*.
        losses: [draw, sample] l_i(w) - l_i(w*) of the samples of the probe, nats.
        num_coordinates: free coordinates of the component.
        step_seconds: of one sampler step.
        draw_seconds: of measuring one draw.
        temperatures, step_biases, stiff_temperatures: [block] of steps, see ``sampling.temperature``.
        num_workers: chains that ran side by side when this one did.
        failure: why the chain ended before its time; empty if it did not.
    """

    mean_loss: Floats
    observables: Floats
    losses: Floats
    num_coordinates: int
    step_seconds: float
    draw_seconds: float
    temperatures: Floats = field(default_factory=lambda: np.zeros(0))
    step_biases: Floats = field(default_factory=lambda: np.zeros(0))
    stiff_temperatures: Floats = field(default_factory=lambda: np.zeros(0))
    num_workers: int = 1
    failure: str = ""


@dataclass(frozen=True)
class Assessment:
    """What the trials of a setting showed; NaN and nothing where a chain diverged.

    Attributes:
        failure: the failure mode that makes the setting unusable; empty if there is none.
        reason: what was seen, and the knob to turn.
        notes: findings that do not make it unusable.
        burn_in: draws left out of each chain.
        num_draws: draws kept of each chain.
        effective_draws: bulk ESS of the slowest observable, all chains together.
        slowest: that observable.
        rhat: the largest of the observables.
        reliability: correlation of chi between halves of the chains, mean over the observables.
        reliabilities: the same of each observable.
        signals: observable -> spread and noise of chi.
        temperature, temperature_stiff: virial temperature of all coordinates, and of the stiffest directions; 1 for the
            posterior.
        step_bias: what steps and minibatches make the LLC too large by, nats; not of ``sgnht``.
        bias_ratio: the largest bias, of the LLC or of chi, over the largest that may be.
    """

    setting: Setting
    num_chains: int
    steps_between_draws: int
    step_seconds: float
    draw_seconds: float
    failure: str
    reason: str
    notes: tuple[str, ...] = ()
    burn_in: int = 0
    num_draws: int = 0
    effective_draws: float = np.nan
    slowest: str = ""
    rhat: float = np.nan
    reliability: float = np.nan
    reliabilities: Mapping[str, float] = field(default_factory=dict)
    llc: TraceMean = _UNKNOWN
    signals: Mapping[str, Signal] = field(default_factory=dict)
    temperature: TraceMean = _UNKNOWN
    temperature_stiff: TraceMean = _UNKNOWN
    step_bias: TraceMean = _UNKNOWN
    bias_ratio: float = np.nan

    @property
    def effective_per_second(self) -> float:
        """Effective draws a second of one worker, usable or not."""
        seconds = self.steps_between_draws * self.step_seconds + self.draw_seconds
        return self.effective_draws / (self.num_chains * self.num_draws * seconds) if self.num_draws else np.nan

    @property
    def usable_per_second(self) -> float:
        """Effective draws a second of one worker; none with a failure mode."""
        return 0.0 if self.failure else self.effective_per_second

    @property
    def loss_rise(self) -> float:
        """E[L(w)] - L(w*), nats."""
        return self.llc.value / self.setting.inverse_temperature


def burn_in_of(mean_loss: ArrayLike) -> int:
    """The first draw at which the loss has come up to its plateau; at most half of the draws.

    A crossing-of-the-mean rule (Gafarian, Ancker & Morisaku, Naval Research Logistics 25:511, 1978): the first draw at
    which the mean over the chains is no further below its own mean over the second half of the draws than one standard
    deviation there, or 5 %. A loss that still rises in the second half is left to ``failure_modes``.

    Args:
        mean_loss: [chain, draw] nats, from the checkpoint on.

    Examples:
        >>> burn_in_of([[0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
        2
    """
    trace = np.asarray(mean_loss, np.float64).mean(axis=0)
    late = trace[len(trace) // 2 :]
    tolerance = max(late.std(), _PLATEAU_TOLERANCE * abs(late.mean()))
    return int(np.argmax(trace >= late.mean() - tolerance).clip(max=len(trace) // 2))


def assess(
    setting: Setting, trials: Sequence[Trial], observables: Sequence[str], steps_between_draws: int
) -> Assessment:
    """Judge a setting by its trials: burn-in, failure modes, effective draws a second, reliability of chi, LLC.

    chi_i = -Cov(phi, l_i - L) of each chain after the burn-in, for every sample of the probe. An observable that never
    moves, since it does not depend on the component, is left out of what is said of all of them.

    Args:
        setting: that the trials were run with.
        trials: one a chain, at least two.
        observables: names of the columns of ``Trial.observables``.
        steps_between_draws: of the trials.
    """
    known = partial(
        Assessment,
        setting=setting,
        num_chains=len(trials),
        steps_between_draws=steps_between_draws,
        step_seconds=float(np.mean([trial.step_seconds for trial in trials])),
        draw_seconds=float(np.mean([trial.draw_seconds for trial in trials])),
    )
    failures = [trial.failure for trial in trials if trial.failure]
    if failures:
        return known(failure=DIVERGED, reason=f"{len(failures)} of {len(trials)} chains: {failures[0]}")
    mean_loss = np.stack([trial.mean_loss for trial in trials])
    burn_in = burn_in_of(mean_loss)
    left_out = burn_in / mean_loss.shape[1]
    mean_loss = mean_loss[:, burn_in:]
    phi = np.stack([trial.observables[burn_in:] for trial in trials])
    chi = np.stack([_susceptibility(phi[c], trial.losses[burn_in:]) for c, trial in enumerate(trials)])
    diagnostics = observable_diagnostics({name: phi[:, :, k] for k, name in enumerate(observables)})
    moving = [name for name, numbers in diagnostics.items() if np.isfinite(numbers["ess_bulk"])]
    slowest = min(moving, key=lambda name: diagnostics[name]["ess_bulk"], default="")
    reliabilities = dict(zip(observables, split_half_reliability(chi).tolist(), strict=True))
    failure, reason, notes = unusable(
        mean_loss,
        {name: phi[:, :, observables.index(name)] for name in moving},
        setting.inverse_temperature,
        trials[0].num_coordinates,
    )
    return known(
        failure=failure,
        reason=reason,
        notes=notes,
        burn_in=burn_in,
        num_draws=mean_loss.shape[1],
        effective_draws=diagnostics[slowest]["ess_bulk"] if moving else np.nan,
        slowest=slowest,
        rhat=max((diagnostics[name]["rhat"] for name in moving), default=np.nan),
        reliability=float(np.mean([reliabilities[name] for name in moving])) if moving else np.nan,
        reliabilities=reliabilities,
        llc=llc(mean_loss, setting.inverse_temperature),
        signals={name: signal(chi[:, observables.index(name)]) for name in moving},
        temperature=_level([trial.temperatures for trial in trials], left_out),
        temperature_stiff=_level([trial.stiff_temperatures for trial in trials], left_out),
        step_bias=_level([trial.step_biases for trial in trials], left_out),
    )


def _level(blocks: Sequence[Floats], left_out: float) -> TraceMean:
    """Mean of [block] of every chain, without the share that is left out at the start."""
    kept = np.stack(blocks)[:, math.ceil(left_out * len(blocks[0])) :]
    return trace_mean(kept) if kept.shape[1] >= 4 else _UNKNOWN


def _susceptibility(phi: Floats, losses: Floats) -> Floats:
    """chi of one chain [observable, sample]."""
    losses = np.asarray(losses, np.float64)
    excess = losses - losses.mean(axis=1, keepdims=True)
    return -(phi - phi.mean(axis=0)).T @ excess / (len(phi) - 1)
