"""Settings in the order in which they are worth sampling with.

n_beta and gamma say *what* is estimated: another pair is another posterior, with other susceptibilities. eps says how
fast, up to a bias in proportion to it. So step sizes are ranked within each (n_beta, gamma), and posteriors by what the
best of their step sizes gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patterning_dist.response.calibration import Assessment
from patterning_dist.response.usable import DIVERGED


def rank(assessments: Sequence[Assessment]) -> list[Assessment]:
    """Best first: the step sizes of a posterior by usable effective draws a second, posteriors by reliability of chi.

    The reliability of a posterior is that at its fastest usable step size. Settings with a failure mode come after all
    others, diverged ones at the very end.
    """
    fastest: dict[tuple[float, float], Assessment] = {}
    for one in sorted(assessments, key=lambda a: a.usable_per_second):
        if not one.failure:
            fastest[one.setting.posterior] = one

    def place(one: Assessment) -> tuple[float, ...]:
        best = fastest.get(one.setting.posterior)
        reliability = -np.inf if best is None or np.isnan(best.reliability) else best.reliability
        failed = 2 if one.failure == DIVERGED else 1 if one.failure else 0
        return (failed, -reliability, *one.setting.posterior, -one.usable_per_second, one.setting.step_size)

    return sorted(assessments, key=place)
