"""Ways in which chains fail, distinguished by their loss traces, each with the knob to turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import ArrayLike

from patterning_dist.response.arviz import array_stats
from patterning_dist.response.batch_means import degrees_of_freedom
from patterning_dist.response.diagnostics import checked_trace, rank_rhat
from patterning_dist.response.llc import TraceMean, llc, trace_mean
from patterning_dist.response.moments import Floats

MAX_RHAT = 1.05  # where draws are many; see largest_rhat
# A healthy loss is a Gamma variable at its most skewed: with shape 1/2, one draw in a million is 13 scales (below) up.
SPIKE_SCALES = 15.0
ESCAPE_RATIO = 2.0  # a chain whose loss rises by so many times the others' is elsewhere
MIN_DRIFT = 0.1  # of the mean rise: a smaller drift leaves the LLC as it is, however significant
MIN_LLC = 0.1  # the data move the log posterior by less than this many nats: the chains sample the localisation
MIN_RELIABILITY = 0.1
MAX_EXCESS = 0.1  # of the virial temperature over 1: with it the variance of a coordinate is off by as much on average
# eps times a precision P: the variance in that direction is 1 / (1 - eps P / 4) times the posterior's.
MAX_STIFFNESS, GOOD_STIFFNESS = 0.4, 0.2
ROUNDING = 1e-4  # of a Hessian product in float32, relative to the largest eigenvalue
MIN_STEP_BIAS = 0.05  # of the LLC; a bias below its standard error is no finding either
CHANCE = 1e-3  # how often chance alone may pass for a finding, each kind of it


class Finding(NamedTuple):
    """One failure mode.

    Attributes:
        mode: diverged, below_checkpoint, spikes, still_rising, still_falling, chains_disagree, too_hot, too_cold,
            too_stiff, negative_curvature or too_little_signal.
        chains: numbers of the chains it was seen in.
        evidence: what was measured, name -> number.
        message: what was seen, and which keys of the configuration to turn.
    """

    mode: str
    chains: tuple[int, ...]
    evidence: dict[str, float]
    message: str


def failure_modes(
    losses: ArrayLike,
    *,
    inverse_temperature: float,
    num_coordinates: int,
    chains: Sequence[int] | None = None,
    rhat: Mapping[str, float] | None = None,
    reliability: Mapping[str, float] | None = None,
    excluded: Mapping[int, str] | None = None,
    temperatures: ArrayLike = (),
    step_biases: ArrayLike = (),
    stiff_temperatures: ArrayLike = (),
    precisions: tuple[float, float] | None = None,
    step_size: float | None = None,
) -> list[Finding]:
    """What is wrong with a set of chains; an empty list if nothing was found.

    Args:
        losses: [chain, draw] L(w) - L(w*) in nats, draws after burn-in, chains that were not left out (may be none).
        inverse_temperature: n_beta.
        num_coordinates: d, free coordinates of the component.
        chains: numbers of the rows of `losses` (default: 0, 1, ...).
        rhat: observable -> rank R-hat, of other observables than the loss; NaN counts for nothing.
        reliability: observable -> split-half reliability of its chi; NaN counts for nothing.
        excluded: chain -> reason.
        temperatures: [chain, block] virial temperatures of blocks of steps after burn-in, of the chains in `losses`;
            fewer than 4 blocks count for nothing.
        step_biases: [chain, block] what the steps add to the LLC, nats; likewise.
        stiff_temperatures: [chain, block] ``temperatures`` along the stiffest directions alone; likewise.
        precisions: (smallest, largest) eigenvalue of n_beta H + gamma at w*.
        step_size: eps, where it is the same for all coordinates.

    Raises:
        PatterningError: `losses` are no [chain, draw] of 4 draws or more, or not finite.

    Examples:
        >>> losses, settings = np.random.default_rng(0).normal(0.02, 0.01, (4, 400)), {"num_coordinates": 4}
        >>> failure_modes(losses, inverse_temperature=100.0, **settings)  # LLC 100 * 0.02, half of 4
        []
        >>> failure_modes(losses - 0.03, inverse_temperature=100.0, **settings)[0].mode  # below the checkpoint's loss
        'below_checkpoint'
    """
    findings = _diverged(excluded or {})
    if len(np.asarray(losses)) == 0:
        return findings
    trace = checked_trace("losses", losses)
    numbers = tuple(range(len(trace))) if chains is None else tuple(chains)
    below = _below_checkpoint(trace, numbers)
    spiked, escaped, scale = _spikes(trace, numbers)
    # Spikes and escaped chains would pass for a drift or a disagreement.
    kept = [row for row, chain in enumerate(numbers) if chain not in escaped]
    usual = np.minimum(trace, np.median(trace, axis=1, keepdims=True) + SPIKE_SCALES * scale)[kept]
    drift, steady = _drift(usual, [numbers[row] for row in kept])
    disagreement = _disagreement(steady, [numbers[row] for row in kept], rhat or {})
    little = [] if below else _too_little_rise(usual, numbers, inverse_temperature, num_coordinates)
    virial, biases, stiff = (np.asarray(values) for values in (temperatures, step_biases, stiff_temperatures))
    heat = _temperature(numbers, virial, biases, stiff, llc(trace, inverse_temperature))
    noise = _unreliable(numbers, reliability or {})
    ends = [] if precisions is None else _curvature(numbers, *precisions, step_size)
    return [*findings, *below, *spiked, *drift, *disagreement, *heat, *ends, *little, *noise]


def _diverged(excluded: Mapping[int, str]) -> list[Finding]:
    if not excluded:
        return []
    reasons = "; ".join(f"chain {chain}: {reason}" for chain, reason in excluded.items())
    text = f"left out: {reasons}; if their losses blew up, lower sampling.step_size"
    return [Finding("diverged", tuple(excluded), {"chains": float(len(excluded))}, text)]


def _below_checkpoint(trace: Floats, numbers: tuple[int, ...]) -> list[Finding]:
    if trace.mean() >= 0:
        return []
    mean = llc(trace, 1.0)
    # A true minimum has E[L] > L(w*), so chance needs no smaller level than this here.
    if mean.interval(0.95)[1] >= 0:
        return []
    text = (
        f"the mean loss lies {-mean.value:.3g} +- {mean.standard_error:.1g} nats below that of the checkpoint, which "
        "is no minimum; train or anneal it further, raise sampling.localization, or, if it was trained with weight "
        "decay and is the minimum of loss and decay together, set sampling.weight_decay"
    )
    return [Finding("below_checkpoint", numbers, {"rise": mean.value, "standard_error": mean.standard_error}, text)]


def _spikes(trace: Floats, numbers: tuple[int, ...]) -> tuple[list[Finding], set[int], float]:
    """(findings, chains that are elsewhere altogether, scale of the upper half of the draws)."""
    medians = np.median(trace, axis=1)
    above = trace - medians[:, None]
    scale = float(np.quantile(above, 0.9)) / 1.28  # the standard deviation, for normal draws
    findings: list[Finding] = []
    escaped: set[int] = set()
    if scale <= 0:
        return findings, escaped, np.inf
    if len(trace) > 2:
        middle = np.median(medians)
        spread = max(scale, 1.48 * np.median(np.abs(medians - middle)))
        far = (medians - middle > SPIKE_SCALES * spread) & (medians > ESCAPE_RATIO * max(middle, 0.0))
        escaped = {numbers[row] for row in np.flatnonzero(far)}
    advice = "lower sampling.step_size or raise sampling.localization"
    if escaped:
        text = (
            f"the loss of {_list(sorted(escaped))} lies up to {medians.max() - middle:.3g} nats above that of the "
            f"others, whose median rise is {middle:.3g}; {advice}"
        )
        evidence = {"largest_rise": float(medians.max()), "median_rise": float(middle)}
        findings.append(Finding("spikes", tuple(sorted(escaped)), evidence, text))
    rows, draws = np.nonzero(above > SPIKE_SCALES * scale)
    if len(rows):
        where = np.argmax(above[rows, draws])
        largest = float(above[rows, draws][where] / scale)
        text = (
            f"{len(rows)} draw(s) of {_list([numbers[row] for row in np.unique(rows)])} lie far above the rest (draw "
            f"{draws[where]} of chain {numbers[rows[where]]}: {largest:.0f} standard deviations); {advice}"
        )
        spiking = tuple(numbers[row] for row in np.unique(rows))
        findings.append(Finding("spikes", spiking, {"draws": float(len(rows)), "largest_scales": largest}, text))
    return findings, escaped, scale


def _drift(trace: Floats, numbers: Sequence[int]) -> tuple[list[Finding], Floats]:
    """(findings, the trace without its drift if there is one).

    The rise over all draws by least squares, beyond Student's quantile of its error: inside chains 12 sd^2 tau / T,
    from what a parabola leaves over, with tau its autocorrelation time; or the spread between chains, if larger.
    """
    num_chains, num_draws = trace.shape
    mean = trace.mean(axis=1, keepdims=True)
    if num_draws < 10 or np.ptp(trace) == 0:
        return [], trace
    time = np.linspace(-0.5, 0.5, num_draws)
    rises = (trace - mean) @ time / (time @ time)
    residuals = trace - np.polynomial.polynomial.polyval(time, np.polynomial.polynomial.polyfit(time, trace.T, 2))
    moving = [chain[None] for chain in residuals if np.ptp(chain) > 0]
    effective = [float(array_stats().ess(chain, method="mean")) for chain in moving]
    inside = 12 * sum(c.var(ddof=1) / size for c, size in zip(moving, effective, strict=True)) / num_chains**2
    between = rises.var(ddof=1) / num_chains if num_chains > 1 else np.nan
    # With one or two degrees of freedom no drift of two chains would ever be seen.
    degrees = max(float(degrees_of_freedom(inside, between, max(sum(effective) / 4, 1.0), num_chains)), 3.0)
    error = np.sqrt(np.fmax(inside, between))
    rise, level = rises.mean(), abs(trace.mean())
    # Below one standard deviation of the draws, a drift adds less than a twelfth to their variance.
    harmless = min(MIN_DRIFT * level, residuals.std())
    if abs(rise) <= max(-scipy.special.stdtrit(degrees, CHANCE / 2) * error, harmless):
        return [], trace
    mode, verb = ("still_rising", "rises") if rise > 0 else ("still_falling", "falls")
    text = (
        f"the loss still {verb}, by {abs(rise):.3g} +- {error:.1g} nats over the kept draws (mean {trace.mean():.3g}); "
        "raise sampling.burn_in"
    )
    evidence = {"rise": float(rise), "standard_error": float(error)}
    return [Finding(mode, tuple(numbers), evidence, text)], residuals + mean


def _disagreement(trace: Floats, numbers: Sequence[int], rhat: Mapping[str, float]) -> list[Finding]:
    """R-hat of the loss, and of the other observables."""
    found = dict(rhat)
    if len(trace) > 1 and np.ptp(trace) > 0:
        found["loss"] = rank_rhat(trace)
    limit = largest_rhat(*trace.shape)
    high = {name: value for name, value in found.items() if value > limit}
    if not high:
        return []
    worst = max(high, key=lambda name: high[name])
    text = (
        f"chains disagree: R-hat of {worst} is {high[worst]:.3g}, expected less than {limit:.3g}; raise "
        "sampling.burn_in or sampling.steps_between_draws"
    )
    return [Finding("chains_disagree", tuple(numbers), {f"rhat_{name}": value for name, value in high.items()}, text)]


def largest_rhat(num_chains: int, num_draws: int) -> float:
    """MAX_RHAT, or what independent draws exceed by chance: n (R^2 - 1) + 1 is F with (2 chains - 1, many) degrees."""
    degrees = 2 * num_chains - 1
    chance = scipy.special.chdtri(degrees, CHANCE) / degrees
    return max(MAX_RHAT, float(np.sqrt(1 + (chance - 1) / (num_draws // 2))))


def _temperature(
    numbers: tuple[int, ...], temperatures: Floats, biases: Floats, stiff: Floats, found: TraceMean
) -> list[Finding]:
    """Chains hotter than the posterior by their steps and minibatches, or colder, since they have not spread yet."""
    if temperatures.ndim != 2 or temperatures.shape[1] < 4:
        return []
    temperature = trace_mean(temperatures)
    low, high = _interval(temperature)
    text = f"virial temperature {temperature.value:.3g} +- {temperature.standard_error:.1g}, 1 for the posterior"
    evidence = {"temperature": temperature.value}
    if high < 1 - MAX_EXCESS:
        text = f"the chains have not spread over the posterior yet ({text}); raise sampling.burn_in"
        return [Finding("too_cold", numbers, evidence, text)]
    is_hot, more = low > 1 + MAX_EXCESS, ""
    if biases.shape == temperatures.shape:
        bias = trace_mean(biases)
        smallest = max(MIN_STEP_BIAS * abs(found.value), found.standard_error)
        if _interval(bias)[0] > 0 and bias.value > smallest:
            is_hot, more = True, f", which makes the LLC ({found.value:.3g}) too large by up to {bias.value:.2g}"
            evidence["step_bias"] = bias.value
    if stiff.shape == temperatures.shape:
        along = trace_mean(stiff)
        if _interval(along)[0] > 1 + MAX_EXCESS:
            is_hot, evidence["temperature_stiff"] = True, along.value
            text += f", {along.value:.3g} +- {along.standard_error:.1g} in its stiffest directions"
    if not is_hot:
        return []
    text = (
        f"steps and minibatches heat the chains ({text}){more}; lower sampling.step_size, raise sampling.batch_size or "
        "set sampling.gradient: control_variate"
    )
    return [Finding("too_hot", numbers, evidence, text)]


def _curvature(numbers: tuple[int, ...], smallest: float, largest: float, step_size: float | None) -> list[Finding]:
    """A direction too stiff for the step size, and one in which the posterior is no Gaussian."""
    found = []
    if step_size is not None and step_size * largest > MAX_STIFFNESS:
        stiffness = step_size * largest
        excess = f"{1 / (1 - stiffness / 4):.2g} times the posterior's" if stiffness < 4 else "without bound"
        text = (
            f"the stiffest direction has a precision of {largest:.3g}, {stiffness:.2g} over sampling.step_size: its "
            f"variance is {excess}; lower sampling.step_size to {GOOD_STIFFNESS / largest:.2g}"
        )
        found.append(Finding("too_stiff", numbers, {"stiffness": stiffness, "precision": largest}, text))
    if smallest < -ROUNDING * largest:
        text = (
            "the posterior curves downwards at the checkpoint (n_beta H + gamma has an eigenvalue of "
            f"{smallest:.3g}) and is no Gaussian there; raise sampling.localization by more than {-smallest:.2g}, "
            "lower sampling.inverse_temperature or train further"
        )
        found.append(Finding("negative_curvature", numbers, {"precision": smallest}, text))
    return found


def _interval(mean: TraceMean) -> tuple[float, float]:
    """That chance misses with CHANCE; like drifts, on 3 degrees of freedom or more."""
    return mean._replace(degrees_of_freedom=max(mean.degrees_of_freedom, 3.0)).interval(1 - CHANCE)


def _too_little_rise(
    trace: Floats, numbers: tuple[int, ...], inverse_temperature: float, num_coordinates: int
) -> list[Finding]:
    found = float(inverse_temperature * trace.mean())
    expected = num_coordinates / 2  # of a regular model without localisation
    if abs(found) >= MIN_LLC * min(expected, 1.0):
        return []
    text = (
        f"the loss hardly moves: n_beta (E[L] - L(w*)) is {found:.2g}, of at most {expected:g} for {num_coordinates} "
        "coordinates; lower sampling.localization or raise sampling.step_size"
    )
    return [Finding("too_little_signal", numbers, {"llc": found, "largest_llc": expected}, text)]


def _unreliable(numbers: tuple[int, ...], reliability: Mapping[str, float]) -> list[Finding]:
    low = {name: value for name, value in reliability.items() if value < MIN_RELIABILITY}
    if not low:
        return []
    text = (
        f"chi of {', '.join(f'{name} ({value:.2f})' for name, value in low.items())} is noise: its split-half "
        f"reliability is below {MIN_RELIABILITY:g}; raise sampling.num_draws or sampling.num_chains, or lower "
        "sampling.localization"
    )
    return [Finding("too_little_signal", numbers, {f"reliability_{name}": v for name, v in low.items()}, text)]


def _list(chains: Sequence[int]) -> str:
    return ("chain " if len(chains) == 1 else "chains ") + ", ".join(map(str, chains))
