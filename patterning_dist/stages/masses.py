"""Which losses of the pool belong together where `solve.keep_mass` holds the weight of groups."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from patterning_dist.errors import PatterningError
from patterning_dist.tasks.task import Task


def mass_groups(task: Task, index: Mapping[str, np.ndarray], key: str) -> np.ndarray:
    """Numbers of the groups of losses that share a token, a domain or a label. [entry]

    Args:
        task: whose training samples they are.
        index: sample and, where samples have several losses, position of every entry.
        key: `token`, `domain` or `label`.

    Raises:
        PatterningError: nothing of this name is known of the task's samples or losses.
    """
    ids = np.arange(len(task.train))
    of_samples, of_losses = task.index(task.train, ids), task.entries(task.train, ids)
    if key in of_samples:
        values = of_samples[key][index[task.key]]
    elif key in of_losses:
        values = of_losses[key][index[task.key], index["position"] - 1]
    else:
        known = [name for name in (*of_samples, *of_losses) if name != task.key]
        raise PatterningError(
            f"solve.keep_mass: '{key}' is not known of these samples; "
            + (f"expected one of {', '.join(known)}" if known else "nothing is, so remove the key")
        )
    return np.unique(values, return_inverse=True)[1]
