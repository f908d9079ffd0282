"""Settings in the order in which they are worth sampling with.

n_beta and gamma say *what* is estimated: another pair is another posterior, with other susceptibilities. eps says how
fast, up to a bias in proportion to it. So step sizes are ranked within each (n_beta, gamma), and posteriors by what the
best of their step sizes gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from patterning_dist.response.calibration import Assessment
from patterning_dist.response.usable import DIVERGED

STEP_BIAS = "biased by the step"
# A loss rise that differs by more than this share from that at a smaller step is not the same posterior's any more.
MAX_STEP_BIAS = 0.2


def rank(assessments: Sequence[Assessment]) -> list[Assessment]:
    """Best first: the step sizes of a posterior by usable effective draws a second, posteriors by reliability of chi.

    The reliability of a posterior is that at its fastest usable step size. Settings with a failure mode come after all
    others, diverged ones at the very end. One more failure mode shows only here: a setting is biased by the step if its
    LLC differs from that at the smallest usable step size of its posterior by more than ``MAX_STEP_BIAS`` and by more
    than two standard errors.
    """
    checked = [_with_step_bias(one, assessments) for one in assessments]
    fastest: dict[tuple[float, float], Assessment] = {}
    for one in sorted(checked, key=lambda a: a.usable_per_second):
        if not one.failure:
            fastest[one.setting.posterior] = one

    def place(one: Assessment) -> tuple[float, ...]:
        best = fastest.get(one.setting.posterior)
        reliability = -np.inf if best is None or np.isnan(best.reliability) else best.reliability
        failed = 2 if one.failure == DIVERGED else 1 if one.failure else 0
        return (failed, -reliability, *one.setting.posterior, -one.usable_per_second, one.setting.step_size)

    return sorted(checked, key=place)


def _with_step_bias(one: Assessment, assessments: Sequence[Assessment]) -> Assessment:
    if one.failure:
        return one
    posterior = [a for a in assessments if a.setting.posterior == one.setting.posterior and not a.failure]
    reference = min(posterior, key=lambda a: a.setting.step_size)
    off = abs(one.llc.value - reference.llc.value)
    error = np.hypot(one.llc.standard_error, reference.llc.standard_error)
    if off <= max(MAX_STEP_BIAS * abs(reference.llc.value), 2 * error):
        return one
    reason = (
        f"the loss rises {one.loss_rise / reference.loss_rise:.2f} times as far as with step_size "
        f"{reference.setting.step_size:g}, so this is another distribution; lower step_size"
    )
    return replace(one, failure=STEP_BIAS, reason=reason)
