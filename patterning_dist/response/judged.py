"""The estimators as `import patterning_dist` has them: they warn of chains whose numbers are not to be believed.

A study says the same in its diagnostics and on its page, so its stages call the functions where they are written.
Co-moments hold no draws: R-hat of an observable is the classic one of half chains, and slowness shows in the means of
batches. Those of chains that mix within a batch are independent; where they follow each other, the errors of chi, which
take them for independent, are too small.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import scipy

from patterning_dist.response import llc as llcs
from patterning_dist.response import solver
from patterning_dist.response import susceptibility as susceptibilities
from patterning_dist.response.columns import Chi
from patterning_dist.response.diagnostics import observable_diagnostics, split_rhat
from patterning_dist.response.failure_modes import CHANCE, MIN_RELIABILITY, failure_modes, largest_rhat
from patterning_dist.response.moments import CoMoments, Floats
from patterning_dist.response.reliability import split_half_reliability
from patterning_dist.response.solver import WeightSolution
from patterning_dist.response.susceptibility import Susceptibility

P = ParamSpec("P")
R = TypeVar("R")

MIN_EFFECTIVE_DRAWS = 100  # of all chains: fewer leave R-hat and the errors themselves uncertain (Vehtari et al. 2021)


class ChainWarning(UserWarning):
    """Chains that do not bear the number that was made of them."""


def _judged(function: Callable[P, R], judge: Callable[..., Iterable[str]]) -> Callable[P, R]:
    """The function, which warns of what `judge` finds in its result and its arguments."""

    @functools.wraps(function)
    def judged(*args: P.args, **kwargs: P.kwargs) -> R:
        result = function(*args, **kwargs)
        if found := list(judge(result, *args, **kwargs)):
            warnings.warn(f"{function.__name__}: {'; '.join(found)}", ChainWarning, stacklevel=2)
        return result

    return judged


def _of_measured(function: Callable[..., WeightSolution]) -> Callable[..., WeightSolution]:
    """The solver, which takes a whole `Susceptibility` for chi as well and then warns of rows that are noise."""

    @functools.wraps(function)
    def solve(chi: Chi | Susceptibility, *args: Any, **options: Any) -> WeightSolution:
        if isinstance(chi, Susceptibility):
            if found := list(_noise(chi)):
                warnings.warn(f"{function.__name__}: {'; '.join(found)}", ChainWarning, stacklevel=2)
            chi = chi.chi
        return function(chi, *args, **options)

    return solve


def _of_chains(result: Susceptibility, chains: Sequence[CoMoments], *args: Any, **options: Any) -> Iterator[str]:
    yield from _unmixed(chains)
    yield from _noise(result)


def _of_losses(result: llcs.TraceMean, losses: Any, inverse_temperature: float, burn_in: int = 0) -> Iterator[str]:
    trace = np.asarray(losses, np.float64)[..., burn_in:]
    for finding in failure_modes(trace, inverse_temperature=inverse_temperature, num_coordinates=2):
        if finding.mode != "too_little_signal":  # which depends on the number of coordinates
            yield finding.message.replace("sampling.", "")
    draws = observable_diagnostics({"losses": trace})["losses"]["ess_bulk"]
    if draws < MIN_EFFECTIVE_DRAWS:
        yield _few("the losses", draws)


def _unmixed(chains: Sequence[CoMoments]) -> Iterator[str]:
    """R-hat and effective draws of every observable, and how slow it and the mean loss of the probe are."""
    used = min(int((moments.count > 0).sum()) for moments in chains)
    means = np.stack([np.column_stack([m.mean_phi, m.mean_loss.mean(axis=1)])[m.count > 0][:used] for m in chains])
    totals, numbers = [moments.total() for moments in chains], ", ".join(str(moments.chain) for moments in chains)
    count, fewest = sum(total.count for total in totals), min(total.count for total in totals)
    within = np.sum([total.m2_phi for total in totals], axis=0) / max(count - len(chains), 1)
    rhats = split_rhat(chains, "phi") if fewest >= 4 and used == len(chains[0].count) else np.zeros_like(within)
    limit = largest_rhat(len(chains), fewest)
    for index, (series, rhat, variance) in enumerate(zip(np.moveaxis(means, 2, 0), rhats, within, strict=False)):
        if rhat > limit:
            yield (
                f"chains {numbers} disagree: R-hat of observable {index} is {rhat:.3g}, expected less than "
                f"{limit:.3g}; raise burn_in or steps_between_draws"
            )
        draws = _effective_draws(series, count, variance)
        if variance > 0 and draws < MIN_EFFECTIVE_DRAWS:
            yield _few(f"observable {index}", draws)
    names = [*(f"observable {index}" for index in range(len(within))), "the mean loss"]
    for name, series in zip(names, np.moveaxis(means, 2, 0), strict=True):
        slow, chance = _neighbours(series)
        if slow > chance:
            yield (
                f"{name} is slower than a batch of draws in chains {numbers}: means of neighbouring batches have a "
                f"correlation of {slow:.2f}, expected less than {chance:.2f}, so errors are too small; draw several "
                "times as long, by num_draws or steps_between_draws"
            )


def _effective_draws(series: Floats, count: int, variance: float) -> float:
    """The most effective draws of all chains that batch means [chain, batch] leave possible, no more than there are.

    Their variance is that of independent draws times the autocorrelation time, and is known to a chi-square.
    """
    num_chains, num_batches = series.shape
    degrees = num_chains * (num_batches - 1)
    spread = ((series - series.mean(axis=1, keepdims=True)) ** 2).sum() / scipy.special.chdtri(degrees, CHANCE)
    independent = variance * num_chains * num_batches / count
    return float(count * min(1.0, independent / spread)) if spread > 0 else float(count)


def _neighbours(series: Floats) -> tuple[float, float]:
    """Correlation of neighbouring batch means [chain, batch], and what independent ones exceed once in 1 / CHANCE."""
    num_chains, num_batches = series.shape
    away = series - series.mean(axis=1, keepdims=True)
    squares = (away**2).sum()
    if num_batches < 4 or squares == 0:
        return 0.0, 1.0
    correlation = (away[:, 1:] * away[:, :-1]).sum() / squares
    # About means of their own independent numbers have -1 / B, with a variance of about 1 / B (Bartlett, 1946).
    return float(correlation), float(-scipy.special.ndtri(CHANCE) / np.sqrt(num_chains * num_batches) - 1 / num_batches)


def _few(name: str, draws: float) -> str:
    return (
        f"as few as {draws:.0f} effective draws of {name}, expected {MIN_EFFECTIVE_DRAWS} or more; raise num_draws or "
        "steps_between_draws"
    )


def _noise(measured: Susceptibility) -> Iterator[str]:
    for row, value in enumerate(split_half_reliability(measured.chi_per_chain)):
        if value < MIN_RELIABILITY:
            yield (
                f"chi of observable {row} is noise: its split-half reliability is {value:.2f}, expected "
                f"{MIN_RELIABILITY:g} or more; weights follow the noise; raise num_draws or the number of chains"
            )


susceptibility = _judged(susceptibilities.susceptibility, _of_chains)
llc_response = _judged(llcs.llc_response, _of_chains)
free_energy_response = _judged(llcs.free_energy_response, _of_chains)
llc = _judged(llcs.llc, _of_losses)
solve_weights = _of_measured(solver.solve_weights)
solve_for_effective_sample_share = _of_measured(solver.solve_for_effective_sample_share)
