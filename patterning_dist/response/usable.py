"""Whether short chains show a failure mode that makes a setting unusable."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import scipy
from numpy.typing import NDArray

from patterning_dist.response.arviz import array_stats
from patterning_dist.response.diagnostics import observable_diagnostics
from patterning_dist.response.failure_modes import CHANCE, MAX_RHAT, Finding, failure_modes

Floats = NDArray[np.floating]

DIVERGED, NOTHING_MOVES, TOO_SLOW = "diverged", "nothing moves", "too slow to judge"
# Effective draws of a chain below which neither its plateau nor its speed is known.
MIN_EFFECTIVE_DRAWS = 5
# Findings that make a setting unusable, the worst first; the others are named, and show in the numbers.
_UNUSABLE = ("below_checkpoint", "spikes", "still_rising", "still_falling", "chains_disagree")
# The advice for a full run is a longer burn-in; how long it must be a trial that never levels off cannot tell.
_LONGER_TRIALS = "; to see it level off raise calibration.num_draws or calibration.steps_between_draws"


def unusable(
    mean_loss: Floats,
    observables: Mapping[str, Floats],
    inverse_temperature: float,
    num_coordinates: int,
) -> tuple[str, str, tuple[str, ...]]:
    """(the worst failure mode, why and which knob to turn, other findings); empty if there are none.

    Args:
        mean_loss: [chain, draw] L(w) - L(w*) after burn-in, nats; no chain has diverged.
        observables: name -> [chain, draw] of every observable that moves.
        inverse_temperature: n_beta.
        num_coordinates: free coordinates of the component.
    """
    diagnostics = observable_diagnostics(observables)
    findings = failure_modes(
        mean_loss,
        inverse_temperature=inverse_temperature,
        num_coordinates=num_coordinates,
        rhat={name: numbers["rhat"] for name, numbers in diagnostics.items()},
    )
    traces = {"loss": mean_loss, **observables}
    grave = [f for f in findings if f.mode in _UNUSABLE and not _is_autocorrelation(f, traces)]
    notes = tuple(f.message for f in findings if f.mode not in _UNUSABLE)
    if not observables:
        return NOTHING_MOVES, "no observable changes with this component; calibrate on another", notes
    effective = min(numbers["ess_bulk"] for numbers in diagnostics.values())
    if not grave and effective < MIN_EFFECTIVE_DRAWS * len(mean_loss):
        text = f"{effective:.0f} effective draws of {mean_loss.size}, expected {MIN_EFFECTIVE_DRAWS} a chain or more"
        return TOO_SLOW, text + "; raise step_size, or calibration.steps_between_draws or num_draws", notes
    if not grave:
        return "", "", notes
    grave.sort(key=lambda finding: _UNUSABLE.index(finding.mode))
    longer = _LONGER_TRIALS if grave[0].mode in ("still_rising", "still_falling") else ""
    return grave[0].mode.replace("_", " "), "; ".join(f.message for f in grave) + longer, notes


def _is_autocorrelation(finding: Finding, traces: Mapping[str, Floats]) -> bool:
    """Whether chains disagree no more than short chains of such autocorrelated draws do by chance.

    n (R^2 - 1) + 1 of half chains of n draws is then tau F, tau the autocorrelation time inside the chains. Slow
    sampling is not a failure of a trial: its effective draws tell it.
    """
    if finding.mode != "chains_disagree":
        return False
    for key, rhat in finding.evidence.items():
        trace = traces[key.removeprefix("rhat_")]
        num_chains, num_draws = trace.shape
        effective = np.mean([array_stats().ess(chain[None], method="mean") for chain in trace if np.ptp(chain)])
        chance = scipy.special.chdtri(2 * num_chains - 1, CHANCE) / (2 * num_chains - 1)
        if rhat > max(MAX_RHAT, np.sqrt(1 + (chance * num_draws / effective - 1) / (num_draws // 2))):
            return False
    return True
