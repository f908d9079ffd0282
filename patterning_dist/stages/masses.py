"""Which losses of the pool belong together by token, domain or label, and weights dealt among them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from patterning_dist.data.sampler import permutation
from patterning_dist.errors import PatterningError
from patterning_dist.stages.scores import Pool
from patterning_dist.tasks.task import Task

_PERMUTED_STREAM = 0x7065726D


def mass_groups(task: Task, index: Mapping[str, np.ndarray], key: str, where: str = "solve.keep_mass") -> np.ndarray:
    """Numbers of the groups of losses that share a token, a domain or a label. [entry]

    Args:
        task: whose training samples they are.
        index: sample and, where samples have several losses, position of every entry.
        key: `token`, `domain` or `label`.
        where: of the experiment file asks for it, for messages.

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
            f"{where}: '{key}' is not known of these samples; "
            + (f"expected one of {', '.join(known)}" if known else "nothing is, so remove it")
        )
    return np.unique(values, return_inverse=True)[1]


def kept_groups(pool: Pool) -> np.ndarray | None:
    """Groups whose mass all weights of a pool keep, by ``solve.keep_mass`` [entry]; None: none is kept."""
    assert pool.config.solve is not None
    keep = pool.config.solve.keep_mass
    return None if keep is None else mass_groups(pool.subjects.task, pool.index, keep)


def dealt(weights: np.ndarray, groups: np.ndarray | None, seed: int) -> np.ndarray:
    """The same weights on other entries, of the same group where groups keep their mass [entry].

    Args:
        weights: of the entries.
        groups: their numbers; None: all are one.
        seed: of the order, which is uniform within every group.
    """
    order = permutation(seed, _PERMUTED_STREAM, len(weights))
    if groups is None:
        return weights[order]
    found = np.empty_like(weights)
    found[np.argsort(groups, kind="stable")] = weights[order[np.argsort(groups[order], kind="stable")]]
    return found
