"""Weights to compare with: of other scores than the posterior's, at the effective share of plus."""

from __future__ import annotations

import numpy as np

from patterning_dist.config.response import AblationControlConfig, ControlConfig
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.response.solver import WeightSolution, solve_for_effective_sample_share
from patterning_dist.stages.moments import ablation_scores
from patterning_dist.stages.scores import Pool
from patterning_dist.tasks.task import Task


def control_weights(pool: Pool, control: ControlConfig, share: float, progress: Progress) -> WeightSolution:
    """Weights of a control, by the solver and within the bounds of the others.

    Args:
        pool: of the experiment.
        control: entry of solve.controls.
        share: effective share of plus.
        progress: shows passes over the pool.

    Raises:
        PatterningError: a split that the training samples do not have, or a share out of reach.
    """
    settings = pool.config.solve
    assert settings is not None
    if isinstance(control, AblationControlConfig):
        with pool.tasks(progress) as run_calls:
            row = ablation_scores(run_calls, pool) * np.sign(
                next(value for value in settings.targets.values() if value)
            )
    else:
        row = split_scores(pool.subjects.task, pool.index, control.split)
    options = {"weight_min": settings.weight_min, "weight_max": settings.weight_max, "observables": [control.name]}
    return solve_for_effective_sample_share(
        row[None], [1.0], share, inverse_temperature=pool.inverse_temperature, **options
    )


def split_scores(task: Task, index: dict[str, np.ndarray], split: str) -> np.ndarray:
    """Coefficients of a split loss on the training samples themselves, less their mean [entry].

    Args:
        task: of the samples.
        index: sample and, where samples have several losses, position of every entry.
        split: of the task, or ``domain:NAME``.

    Raises:
        PatterningError: there is no such split, or none of the losses is in it.
    """
    ids = np.arange(len(task.train))
    if split.startswith("domain:"):
        domains = task.index(task.train, ids).get("domain")
        of_samples = np.zeros(len(ids)) if domains is None else (domains == split.removeprefix("domain:")) * 1.0
        row = of_samples[index[task.key]]
    elif (terms := task.split(split, task.train, ids)) is not None:
        whole = np.sum([sign * mask / max(mask.sum(), 1) for sign, mask in terms], axis=0)
        row = whole[index[task.key]] if "position" not in index else whole[index[task.key], index["position"] - 1]
    else:
        raise PatterningError(f"solve.controls: there is no split {split!r} of the training samples in this task")
    if not np.ptp(row):
        raise PatterningError(f"solve.controls: the split {split!r} tells no training losses apart; choose another")
    return row - row.mean()
