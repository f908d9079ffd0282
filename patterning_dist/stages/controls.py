"""Weights to compare with, at the effective share of plus: of other scores, or those of plus dealt out again.

Ablation and first moments take the sign of the target, a free energy's. Gradient, influence, loss contrast, split and
scores of the user's own know no target: they weigh up what they name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from patterning_dist.config import Config
from patterning_dist.config.checkpoints import INITIALISATION
from patterning_dist.config.controls import (
    AblationControlConfig,
    ControlConfig,
    FirstMomentControlConfig,
    GradientControlConfig,
    InfluenceControlConfig,
    LossContrastControlConfig,
    MinimumNormControlConfig,
    PermutedControlConfig,
    ScoresControlConfig,
    SplitControlConfig,
)
from patterning_dist.errors import PatterningError
from patterning_dist.measure.opening import OpenSubjects
from patterning_dist.progress import Progress
from patterning_dist.response.reliability import split_half_reliability
from patterning_dist.response.solver import WeightSolution, solve_for_effective_sample_share
from patterning_dist.runtime.controls import SplitGradient, pool_alignments, pool_losses
from patterning_dist.runtime.pool import RunCalls
from patterning_dist.stages.levels import units_of
from patterning_dist.stages.masses import dealt, kept_groups, mass_groups
from patterning_dist.stages.moments import ablation_scores, moment_scores
from patterning_dist.stages.scores import Pool, Scores
from patterning_dist.storage.files import read_parquet
from patterning_dist.tasks.splits import split_terms
from patterning_dist.tasks.task import Task

_NO_BOUND = 1e6  # of weights: none is ever there


class Control(NamedTuple):
    """Weights of a control [entry], the solution that they are of (None: dealt), and what solution.json says of it.

    Weights below 0 are of samples whose labels are swapped.
    """

    weights: np.ndarray
    solution: WeightSolution | None
    report: dict[str, Any]


def with_contrasts(config: Config, opener: OpenSubjects, subject: str) -> OpenSubjects:
    """The subjects, and beside them the component of one of them at the checkpoints that controls compare it with."""
    assert config.solve is not None
    others = [control.checkpoint for control in config.solve.controls if control.kind == "loss_contrast"]
    here = opener.by_name[subject]
    there = {_place(checkpoint): replace(here, checkpoint=checkpoint) for checkpoint in others}
    return replace(opener, by_name=opener.by_name | there)


def control_weights(
    pool: Pool, scores: Scores | None, plus: np.ndarray, share: float, progress: Progress
) -> dict[str, Control]:
    """Weights of every control by its name, by the solver, within the bounds and with the kept masses of the others.

    Args:
        pool: of the experiment, its opener ``with_contrasts``.
        scores: of plus, for the control that is of them.
        plus: its weights [entry].
        share: its effective share.
        progress: shows passes over the pool.

    Raises:
        PatterningError: a split, token, domain or label that the samples do not have, scores that are all the same, or
            a share out of reach.
    """
    settings = pool.config.solve
    assert settings is not None
    kept = kept_groups(pool)
    options = {"weight_min": settings.weight_min, "weight_max": settings.weight_max, "groups": kept}
    found, units = {}, units_of(pool)
    with pool.tasks(progress) as run_calls:
        for control in settings.controls:
            report = {"control": control.model_dump(exclude={"name"})}
            if isinstance(control, PermutedControlConfig):
                groups = mass_groups(pool.subjects.task, pool.index, control.within, f"solve.controls: {control.name}")
                groups = groups if kept is None else groups * (kept.max() + 1) + kept  # what shares both
                if units is not None:
                    units.check_whole(groups, f"solve.controls: {control.name}")
                deal = dealt if units is None else units.dealt
                found[control.name] = Control(deal(plus, groups, pool.config.seed), None, report)
                continue
            if isinstance(control, MinimumNormControlConfig):
                assert scores is not None
                solution = _unbounded(pool, scores, kept, share)
                below = {"num_swapped": int((solution.weights < 0).sum())}
                found[control.name] = Control(solution.weights, solution, report | below)
                continue
            row, details = _scores(run_calls, pool, control)
            row = row if units is None else units.means(row)
            groups = np.zeros(len(row), int) if kept is None else kept
            if (row == row[np.unique(groups, return_index=True)[1]][groups]).all():
                alike = "" if kept is None else f" of the same {settings.keep_mass}"
                raise PatterningError(
                    f"solve.controls: the scores of {control.name} tell no training losses{alike} apart; choose another"
                )
            solution = solve_for_effective_sample_share(
                (row - row.mean(dtype=np.float64))[None],
                [1.0],
                share,
                inverse_temperature=pool.inverse_temperature,
                observables=[control.name],
                **options,
            )
            found[control.name] = Control(solution.weights, solution, report | details)
    return found


def _unbounded(pool: Pool, scores: Scores, kept: np.ndarray | None, share: float) -> WeightSolution:
    """h = alpha chi^+ dmu of the targets, whatever the sign of 1 + h."""
    settings = pool.config.solve
    assert settings is not None
    return solve_for_effective_sample_share(
        scores.chi,
        [settings.targets.get(name, 0.0) for name in scores.observables],
        share,
        inverse_temperature=pool.inverse_temperature,
        weight_min=-_NO_BOUND,
        weight_max=_NO_BOUND,
        method=settings.method,
        ridge=settings.ridge,
        rank=settings.rank,
        mode=settings.mode,
        observables=scores.observables,
        groups=kept,
    )


def _scores(run_calls: RunCalls, pool: Pool, control: ControlConfig) -> tuple[np.ndarray, dict[str, Any]]:
    """What losses that weigh more have more of [entry], and what is known of how well it is known."""
    assert pool.config.solve is not None
    sign = np.sign(next((value for value in pool.config.solve.targets.values() if value), 1.0))
    match control:
        case AblationControlConfig():
            return sign * ablation_scores(run_calls, pool), {}
        case FirstMomentControlConfig():
            scores = moment_scores(run_calls, pool, control.draws, [control.name])
            [reliability] = split_half_reliability(scores.per_chain)
            replicates = {"of": scores.replicates, "number": len(scores.per_chain)}
            return sign * scores.row(0), {"reliability": reliability, "replicates": replicates}
        case GradientControlConfig():
            gradient = SplitGradient(pool.run.storage, pool.subject, control.name, control.split)
            return pool_alignments(run_calls, gradient, pool.num_samples)[0], {}
        case InfluenceControlConfig():
            inverse = (control.conjugate_gradient_iterations, control.hessian_sequences)
            gradient = SplitGradient(pool.run.storage, pool.subject, control.name, control.split, inverse)
            row, solve = pool_alignments(run_calls, gradient, pool.num_samples)
            return row, {"conjugate_gradients": solve}
        case LossContrastControlConfig():
            return contrast_scores(run_calls, pool, control.checkpoint), {}
        case ScoresControlConfig():
            return given_scores(control.path, pool.index, pool.subjects.task.key), {}
        case SplitControlConfig():
            return split_scores(pool.subjects.task, pool.index, control.split), {}
    raise AssertionError(control.kind)


def contrast_scores(run_calls: RunCalls, pool: Pool, checkpoint: str) -> np.ndarray:
    """Every loss of the pool at another checkpoint less that at the checkpoint of the subject [entry], nats."""
    task = pool.subjects.task
    follows = [task.fingerprint(), pool.config.seed] if checkpoint == INITIALISATION else task.fingerprint(checkpoint)
    places = {_place(checkpoint): follows, pool.subject: None}
    there, here = (pool_losses(run_calls, pool.subject, *place, pool.num_samples) for place in places.items())
    return there - here


def _place(checkpoint: str) -> str:
    """Name of the subject that is looked at there and not sampled."""
    return f"contrast/{checkpoint}"


def given_scores(path: Path, index: dict[str, np.ndarray], key: str) -> np.ndarray:
    """Column ``score`` of a table for every entry [entry].

    Args:
        path: of the table; with a column ``position`` scores are of single losses, else of all of a sample.
        index: sample and, where samples have several losses, position of every entry.
        key: column of the sample's number.

    Raises:
        PatterningError: the table cannot be read, gives a score twice or one that is not finite, or lacks one.
    """
    table, _ = read_parquet(path, [key, "score"])
    if "position" in table.column_names and "position" not in index:
        raise PatterningError(f"{path}: has a column 'position', and a sample has one loss here; remove the column")
    names = [name for name in (key, "position") if name in table.column_names]
    score = table["score"].to_numpy().astype(float)
    if (bad := ~np.isfinite(score)).any():
        raise PatterningError(f"{path} row {bad.argmax()}: score is {score[bad.argmax()]}; expected a finite number")
    given, of_entry = (_numbers([columns[name] for name in names]) for columns in (table, index))
    order = np.argsort(given, kind="stable")
    if (again := given[order][1:] == given[order][:-1]).any():
        row = order[1:][again].min()
        raise PatterningError(f"{path} row {row}: {', '.join(names)} was given before; expected one row for each")
    place = np.minimum(np.searchsorted(given[order], of_entry), len(given) - 1)
    if (missing := given[order][place] != of_entry).any():
        where = ", ".join(f"{name} {index[name][missing.argmax()]}" for name in names)
        raise PatterningError(f"{path}: no score of {where}; give one for every training loss")
    return score[order][place]


def _numbers(columns: list[Any]) -> np.ndarray:
    """One number for a sample, or for a sample and a position below 2^16."""
    found = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        found = (found << 16) + np.asarray(column, np.int64)
    return found


def split_scores(task: Task, index: dict[str, np.ndarray], split: str) -> np.ndarray:
    """Coefficients of a split loss on the training samples themselves [entry].

    Args:
        task: of the samples.
        index: sample and, where samples have several losses, position of every entry.
        split: of the task, or ``domain:NAME``.

    Raises:
        PatterningError: there is no such split.
    """
    ids = np.arange(len(task.train))
    if split.startswith("domain:"):
        domains = task.index(task.train, ids).get("domain")
        of_samples = np.zeros(len(ids)) if domains is None else (domains == split.removeprefix("domain:")) * 1.0
        row = of_samples[index[task.key]]
    elif (terms := split_terms(task, split, task.train, ids)) is not None:
        whole = np.sum([sign * mask / max(mask.sum(), 1) for sign, mask in terms], axis=0)
        row = whole[index[task.key]] if "position" not in index else whole[index[task.key], index["position"] - 1]
    else:
        raise PatterningError(f"solve.controls: there is no split {split!r} of the training samples in this task")
    return row
