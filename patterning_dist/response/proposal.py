"""Which settings are worth a trial: step sizes from the stiffness of the loss, localizations from its least curvature.

One Lanczos run on the Hessian H of the loss serves every posterior: n_beta H + gamma has the same Krylov spaces, and
the precisions n_beta h + gamma. A direction of precision P has 1 / (1 - eps P / 4) times the posterior's variance, and
needs 2 / (eps P) steps to forget where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from patterning_dist.response.calibration import Assessment, Setting, Trial
from patterning_dist.response.failure_modes import GOOD_STIFFNESS, ROUNDING
from patterning_dist.response.ranking import rank
from patterning_dist.response.run_length import STEP_BIAS, TOO_COLD
from patterning_dist.response.usable import DIVERGED, TOO_SLOW

Curvature = tuple[float, float]  # smallest and largest eigenvalue of H, nats per unit of weight squared

_SHARES = (1.0, 0.5)  # of the step size that the stiffness allows: one to choose, one to confirm it
_RELAXATIONS, _MAX_SPACING = 4, 40  # of the softest direction, in a trial; and sampler steps between its draws
_LONGER = 4  # is a trial that follows one too short to be judged
_TOO_SHORT = (TOO_SLOW, TOO_COLD, "still rising", "still falling", "chains disagree")
_ROOM = 2.0  # a raised localization leaves the softest direction half of it
_ROUNDS = 4  # of trials


class Proposal(NamedTuple):
    """What to try, and what not: words for a setting or a posterior -> the reason."""

    settings: list[Setting]
    refused: dict[str, str]


def propose(
    curvature: Curvature,
    inverse_temperatures: Sequence[float],
    localizations: Sequence[float],
    step_sizes: Sequence[float] | None,
    *,
    standard_error: float,
    largest_scale: float = 1.0,
    limit: float = 4.0,
    is_raised: bool,
) -> Proposal:
    """Every posterior with positive precisions, at the step sizes given, or at those that its stiffness allows.

    eps = min(0.2, wanted error) / P_max and half of it: chi of the stiffest direction is too large by eps P / 2.
    Where the smallest precision is not positive the posterior is no Gaussian at w*, and it is refused with the
    localization 2 n_beta |h_min| that mends it.

    Args:
        curvature: of the loss at w*.
        inverse_temperatures: n_beta.
        localizations: gamma.
        step_sizes: eps; None: from the stiffness.
        standard_error: wanted, of chi over its spread.
        largest_scale: the largest preconditioner: eps times it is what bears on a precision.
        limit: eps P at which a chain must diverge.
        is_raised: whether a posterior with the localization that mends one takes the place of a refused one.
    """
    settings, refused = dict[Setting, None](), dict[str, str]()
    for n_beta, gamma in product(sorted(set(inverse_temperatures)), sorted(set(localizations))):
        smallest, _ = precisions(curvature, n_beta, gamma)
        if smallest <= 0 and -curvature[0] > ROUNDING * curvature[1]:
            mended = float(f"{_ROOM * n_beta * -curvature[0]:.3g}")
            refused[f"inverse_temperature {n_beta:g}, localization {gamma:g}"] = (
                f"n_beta H + gamma has an eigenvalue of {smallest:.3g} at the checkpoint, so the posterior has no "
                f"Gaussian there; localization {mended:g} mends it, or further training"
            )
            if not is_raised:
                continue
            gamma = mended
        largest = precisions(curvature, n_beta, gamma)[1] * largest_scale
        allowed = min(GOOD_STIFFNESS, standard_error) / largest
        for eps in step_sizes or [float(f"{share * allowed:.3g}") for share in _SHARES]:
            setting = Setting(eps, n_beta, gamma)
            if eps * largest >= limit:
                refused[setting.words] = (
                    f"step_size times the largest precision, {largest:.3g}, is {limit:g} or more, which must diverge; "
                    f"{allowed:.2g} is good"
                )
            else:
                settings[setting] = None
    return Proposal(sorted(settings, key=lambda s: (*s.posterior, s.step_size)), refused)


def precisions(curvature: Curvature, inverse_temperature: float, localization: float) -> tuple[float, float]:
    """Smallest and largest eigenvalue of n_beta H + gamma."""
    smallest, largest = (inverse_temperature * h + localization for h in curvature)
    return smallest, largest


def spacing(setting: Setting, curvature: Curvature, num_draws: int) -> int:
    """Steps between the draws of a trial, so that its softest direction relaxes some four times, squares in it eight.

    Args:
        setting: of the trial.
        curvature: of the loss at w*.
        num_draws: of the trial.
    """
    softest = max(precisions(curvature, *setting.posterior)[0], setting.localization / _ROOM)
    steps = _RELAXATIONS * 2 / (setting.step_size * softest)
    return min(math.ceil(steps / num_draws), _MAX_SPACING)


def next_trials(
    judged: Mapping[Setting, tuple[Assessment, int]], space: Callable[[Setting], int]
) -> dict[Setting, int]:
    """What to try next of the posteriors that have no usable setting yet -> steps between the draws.

    Where all steps were biased or diverged, a smaller one: the bias goes as the step size, and how often it is what is
    allowed has been measured. Where a trial was too short to level off, a longer one.

    Args:
        judged: setting -> what its trials showed, and the steps between their draws.
        space: setting -> steps between the draws of its first trial.
    """
    by_posterior: dict[tuple[float, float], list[tuple[Assessment, int]]] = {}
    for one, steps in judged.values():
        by_posterior.setdefault(one.setting.posterior, []).append((one, steps))
    found = {}
    for tried in by_posterior.values():
        if any(not one.failure for one, _ in tried):
            continue
        smallest, length = min(tried, key=lambda pair: pair[0].setting.step_size)
        for one, steps in tried:
            if one.failure in _TOO_SHORT:
                found[one.setting] = _LONGER * steps
        if smallest.failure in (STEP_BIAS, DIVERGED):
            share = 0.25 if smallest.failure == DIVERGED else min(0.5, max(0.1, 0.8 / smallest.bias_ratio))
            smaller = smallest.setting._replace(step_size=float(f"{share * smallest.setting.step_size:.3g}"))
            # In units of its relaxation no shorter than the last one.
            found[smaller] = max(space(smaller), round(length * smallest.setting.step_size / smaller.step_size))
    return found


def search(
    first: Sequence[Setting],
    run: Callable[[Mapping[Setting, int]], Mapping[Setting, Sequence[Trial]]],
    judge: Callable[[Setting, Sequence[Trial], int], Assessment],
    space: Callable[[Setting], int],
    is_fixed: bool,
) -> tuple[list[Assessment], dict[Setting, Sequence[Trial]]]:
    """Try the settings, and others as long as none is usable; what came of each, best first, and the trials.

    Args:
        first: settings to begin with.
        run: runs the trials of settings -> steps between the draws.
        judge: says what they showed.
        space: setting -> steps between the draws of its first trial.
        is_fixed: whether nothing else may be tried.
    """
    trials, judged = dict[Setting, Sequence[Trial]](), dict[Setting, tuple[Assessment, int]]()
    new = {setting: space(setting) for setting in first}
    for _ in range(_ROUNDS):
        trials |= run(new)
        judged |= {setting: (judge(setting, trials[setting], steps), steps) for setting, steps in new.items()}
        new = {} if is_fixed else next_trials(judged, space)
        if not new:
            break
    return rank([one for one, _ in judged.values()]), trials
