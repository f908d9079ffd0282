"""How long a full run must be for chi of a wanted standard error, predicted from a few short chains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy
from numpy.typing import ArrayLike

from patterning_dist.response.failure_modes import MAX_EXCESS

if TYPE_CHECKING:
    from patterning_dist.response.calibration import Assessment

# Autocorrelation times of the slowest observable that a burn-in takes at least: what is left of the start is then
# exp(-10) for an autoregression (Sokal, "Monte Carlo methods in statistical mechanics", 1997, asks for 20 exponential
# ones, which are half as long). The loss levels off long before slow directions do, and a full run can afford it.
_BURN_IN_TIMES = 5
STEP_BIAS, TOO_COLD = "biased", "too cold"
# Of the standard error of the answer: with half of it an interval of 95 % covers 92, and the error grows by an eighth.
MAX_BIAS = 0.5
# Of the LLC: trials whose chi is little more than noise predict runs of any length, and errors as small.
MIN_LLC_ERROR = 0.01


class Signal(NamedTuple):
    """chi of one observable over the samples, against its noise.

    Attributes:
        spread: standard deviation of chi over the samples, the noise taken out; NaN where there is nothing but noise.
        ratio: variance of one chain's chi over spread^2; NaN where there is nothing but noise.
        low, high: 95 % interval of the ratio; 0 and infinity where the chains cannot tell.
        median_ratio: with the median variance over the samples for the mean one: a few samples may have most of it.
    """

    spread: float
    ratio: float
    low: float
    high: float
    median_ratio: float

    def relative_error(self, num_chains: int) -> float:
        """Standard error of chi from that many such chains (root mean square over the samples), over its spread.

        The reliability of chi, its correlation with another such estimate, is 1 / (1 + this^2).
        """
        return math.sqrt(self.ratio / num_chains)

    def median_error(self, num_chains: int) -> float:
        """The same with the median over the samples."""
        return math.sqrt(self.median_ratio / num_chains)


def signal(chi_per_chain: ArrayLike) -> Signal:
    """Spread of chi over samples and the noise of one chain: V = mean_i Var_c(chi_ci), S^2 = mean_i chi_i^2 - V / C.

    The decomposition of a one-way analysis of variance, samples against chains, so V / S^2 is unbiased but for the
    ratio; rows of chi have mean zero over the samples. The interval deletes one chain at a time (jackknife of
    log V / S^2, Student t with C - 1 degrees of freedom): errors of the samples of one chain are not independent.

    Args:
        chi_per_chain: [chain, sample], at least two chains.
    """
    chi = np.asarray(chi_per_chain, np.float64)
    num_chains = len(chi)
    spread_squared, ratio = _ratio(chi)
    spread = math.sqrt(spread_squared) if spread_squared > 0 else math.nan
    median_ratio = float(np.median(chi.var(axis=0, ddof=1))) / spread**2
    without = [_ratio(np.delete(chi, chain, axis=0))[1] for chain in range(num_chains)] if num_chains > 2 else []
    if not without or not np.isfinite([ratio, *without]).all():
        return Signal(spread, ratio, 0.0, math.inf, median_ratio)
    error = math.sqrt((num_chains - 1) * np.var(np.log(without)))
    width = float(scipy.special.stdtrit(num_chains - 1, 0.975)) * error
    return Signal(spread, ratio, ratio * math.exp(-width), ratio * math.exp(width), median_ratio)


def _ratio(chi: np.ndarray) -> tuple[float, float]:
    noise = chi.var(axis=0, ddof=1).mean()
    spread_squared = float((chi.mean(axis=0) ** 2).mean() - noise / len(chi))
    return spread_squared, float(noise / spread_squared) if spread_squared > 0 else math.nan


class Draws(NamedTuple):
    """A number of draws of all chains together, and its 95 % interval."""

    value: float
    low: float
    high: float


def draws_needed(of: Signal, num_draws: int, standard_error: float) -> Draws:
    """Draws after which chi has the wanted error: N = T (V / S^2) / standard_error^2, for the error goes as N^(-1/2).

    Args:
        of: chains of num_draws kept draws each.
        num_draws: T.
        standard_error: of chi over its spread across samples.

    Examples:
        >>> draws_needed(Signal(spread=0.1, ratio=0.5, low=0.25, high=1.0, median_ratio=0.5), 200, standard_error=0.5)
        Draws(value=400.0, low=200.0, high=800.0)
    """
    return Draws(*(num_draws * ratio / standard_error**2 for ratio in (of.ratio, of.low, of.high)))


def covariance_inflation(autocorrelation_time: float, thinning: int) -> float:
    """Variance of a covariance from every thinning-th draw, over that from independent draws: (1 + r^2) / (1 - r^2).

    Bartlett (1946) for two series of autocorrelation rho^k, rho = (tau - 1) / (tau + 1), r = rho^thinning.

    Args:
        autocorrelation_time: tau, in draws.
        thinning: every thinning-th draw is kept.

    Examples:
        >>> [round(covariance_inflation(3.0, thinning), 2) for thinning in (1, 2, 4)]  # near 1: as good as independent
        [1.67, 1.13, 1.01]
    """
    squared = max(0.0, (autocorrelation_time - 1) / (autocorrelation_time + 1)) ** (2 * thinning)
    return (1 + squared) / (1 - squared)


def best_thinning(autocorrelation_time: float, walk_seconds: float, draw_seconds: float, most: int) -> int:
    """Which thinning gives chi the smallest variance in a given time.

    Steps cost time as well as measurements: draws that are nearly copies of the last one are not worth measuring, draws
    that are further apart than that waste steps.

    Args:
        autocorrelation_time: of the draws as they are.
        walk_seconds: from one draw to the next.
        draw_seconds: of measuring one.
        most: the largest thinning considered.

    Examples:
        >>> best_thinning(3.0, walk_seconds=0.1, draw_seconds=1.0, most=20)  # a draw costs as much as ten steps
        3
        >>> best_thinning(3.0, walk_seconds=0.1, draw_seconds=0.0, most=20)  # free draws are all taken
        1
    """

    def cost(thinning: int) -> float:
        return (thinning * walk_seconds + draw_seconds) * covariance_inflation(autocorrelation_time, thinning)

    return min(range(1, most + 1), key=cost)


@dataclass(frozen=True)
class RunPlan:
    """A full run that reaches the wanted standard error, if the trials tell true.

    Attributes:
        num_chains, num_draws, burn_in, steps_between_draws: of every subject, a set of chains; steps are sampler steps.
        needed: observable -> draws of all chains of a subject together; NaN where its chi was nothing but noise.
        slowest: the observable that needs the most; empty where chi was nothing but noise, and num_draws the least.
        llc_error: standard error of the LLC of such a run.
        seconds: the wall time of the whole run, with its 95 % interval in ``low`` and ``high``.
    """

    num_chains: int
    num_draws: int
    burn_in: int
    steps_between_draws: int
    needed: Mapping[str, Draws]
    slowest: str
    llc_error: float
    seconds: Draws


def plan_run(
    found: Assessment, *, standard_error: float, num_chains: int, min_draws: int, num_subjects: int, num_workers: int
) -> RunPlan:
    """Distance between draws, draws a chain and wall time, from the trials of the chosen setting.

    seconds = rounds * (burn_in * step + num_draws * (steps_between_draws * step + draw)), with
    rounds = ceil(subjects * chains / workers), as if every subject cost what the calibrated one did.

    Args:
        found: the trials.
        standard_error: wanted, of chi over its spread across samples, for every observable.
        num_chains: of a subject.
        min_draws: of a chain, whatever the error.
        num_subjects: sets of chains.
        num_workers: chains side by side.
    """
    correlated = max(1.0, found.num_chains * found.num_draws / found.effective_draws)
    walk = found.steps_between_draws * found.step_seconds
    thinning = best_thinning(correlated, walk, found.draw_seconds, most=found.num_draws)
    fewer = covariance_inflation(correlated, thinning) / covariance_inflation(correlated, 1)
    needed = {
        name: Draws(*(fewer * n for n in draws_needed(of, found.num_draws, standard_error)))
        for name, of in found.signals.items()
    }
    slowest = max((n for n in needed if needed[n].value > 0), key=lambda n: needed[n].value, default="")
    burn_in = max(found.burn_in, math.ceil(_BURN_IN_TIMES * correlated)) * found.steps_between_draws
    rounds = -(-num_subjects * num_chains // num_workers)

    def draws_a_chain(draws: float) -> float:
        return max(min_draws, draws / num_chains)

    def seconds(draws: float) -> float:
        one = thinning * walk + found.draw_seconds
        return rounds * (burn_in * found.step_seconds + draws_a_chain(draws) * one)

    most = needed.get(slowest, Draws(math.nan, 0.0, math.inf))
    num_draws = math.ceil(draws_a_chain(most.value)) if slowest else min_draws
    # Of a mean, (1 + r) / (1 - r) takes the place of ``covariance_inflation``; it is the time itself in the trials.
    kept = ((correlated - 1) / (correlated + 1)) ** thinning
    shorter = found.num_chains * found.num_draws / (num_chains * num_draws)
    return RunPlan(
        num_chains=num_chains,
        num_draws=num_draws,
        burn_in=burn_in,
        steps_between_draws=thinning * found.steps_between_draws,
        needed=needed,
        slowest=slowest,
        llc_error=found.llc.standard_error * math.sqrt(shorter * (1 + kept) / (1 - kept) / correlated),
        seconds=Draws(*map(seconds, most)) if slowest else most,
    )


def judge_bias(one: Assessment, plan: RunPlan, standard_error: float, stiffness: float) -> Assessment:
    """The assessment, unusable where its bias is more than ``MAX_BIAS`` of the standard error of the planned answer.

    The LLC's bias is the measured ``step_bias`` b; where there is none, at most b = x LLC; its error is taken to be
    ``MIN_LLC_ERROR`` of it at least. chi of the stiffest directions is a product of two variances at most, each too
    large by x: off by 2 x, where ``standard_error`` of its spread is the error wanted. x is eps P / 4, or the
    temperature's excess over 1 where 95 % intervals show a larger one.

    Args:
        one: without a failure mode.
        plan: of a full run at its setting.
        standard_error: wanted, of chi over its spread.
        stiffness: eps P of the stiffest direction; 0 where a preconditioner makes it unknown.
    """
    if math.isfinite(one.temperature.value) and one.temperature.interval()[1] < 1 - MAX_EXCESS:
        text = f"virial temperature {one.temperature.value:.2g}: the chains have not spread over the posterior yet"
        return replace(one, failure=TOO_COLD, reason=text + "; raise calibration.steps_between_draws or num_draws")
    measured = [t.interval()[0] - 1 for t in (one.temperature, one.temperature_stiff) if math.isfinite(t.value)]
    excess = max([stiffness / 4, *measured])
    bias = one.step_bias.value if math.isfinite(one.step_bias.value) else excess * one.llc.value
    error = max(plan.llc_error, MIN_LLC_ERROR * abs(one.llc.value))
    of_llc, of_chi = bias / (MAX_BIAS * error), 2 * excess / (MAX_BIAS * standard_error)
    checked = replace(one, bias_ratio=max(of_llc, of_chi))
    if checked.bias_ratio <= 1.01:  # of rounded step sizes
        return checked
    what = (
        f"the LLC is too large by {bias:.2g}, and the planned run has a standard error of {error:.2g}"
        if of_llc > of_chi
        else f"chi of the stiffest directions is off by {2 * excess:.0%}, and {standard_error:.0%} is the error wanted"
    )
    text = f"{what}; lower step_size to {0.8 / checked.bias_ratio * one.setting.step_size:.2g}"
    return replace(checked, failure=STEP_BIAS, reason=text + ", or set sampling.gradient: control_variate")
