"""Stage ``solve``: susceptibilities of the pool -> sample weights of every arm, with what is predicted of them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.config import Config, SolveConfig
from patterning_dist.data.weights import write_sample_weights
from patterning_dist.errors import PatterningError
from patterning_dist.measure.analysis import SIGN
from patterning_dist.progress import Progress
from patterning_dist.response.columns import Chi
from patterning_dist.response.prediction import (
    PredictedResponse,
    cross_fitted_response,
    predicted_response_with_error,
)
from patterning_dist.response.reliability import split_half_reliability
from patterning_dist.response.solver import WeightSolution, solve_for_effective_sample_share, solve_weights
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.stages.controls import control_weights, with_contrasts
from patterning_dist.stages.cost import hold_cost, scale_arm
from patterning_dist.stages.levels import Units, at_level, units_of
from patterning_dist.stages.masses import dealt, kept_groups
from patterning_dist.stages.moments import choose_subject, first_moment_scores
from patterning_dist.stages.sample import open_subjects, solved_subjects
from patterning_dist.stages.scores import Pool, Scores, direction_scores, plain_scores, regression_scores
from patterning_dist.storage.files import ROWS, write_json, write_parquet_parts
from patterning_dist.storage.run import RunDirectory

_HISTOGRAM_BINS = 48
_SIGNS = {"plus": 1.0, "minus": -1.0}  # of the targets
_SCORES = {
    "response_direction": direction_scores,
    "regression": regression_scores,
    "plain": plain_scores,
    "first_moment": first_moment_scores,
}


def solve(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Score the pool, solve for the weights of plus and minus, permute for the control; returns the files written.

    Raises:
        PatterningError: an infeasible strength (the largest feasible one is named), or contradicting targets.
    """
    assert config.solve is not None
    device = resolve_device(config.device)
    opener = open_subjects(config, run.location, device)
    names = solved_subjects(config, opener.by_name)
    subject, rises = choose_subject(Pool(config, run, opener, names[0], device), names, progress)
    pool = Pool(config, run, with_contrasts(config, opener, subject), subject, device)
    with scored(pool, progress) as scores:
        return _solve_arms(pool, scores, rises, progress)


def _solve_arms(pool: Pool, scores: Scores, rises: dict[str, float], progress: Progress) -> list[Path]:
    config, run, units = pool.config, pool.run, units_of(pool)
    assert config.solve is not None
    outputs = [_write_pool(pool, scores, units)]
    report: dict[str, Any] = {"subject": pool.subject, "mean_rises": rises, **described(pool, scores), "arms": {}}
    refuse_noise("plus", report["reliability"], config.solve)

    progress.start("solving for the weights", 2)
    solutions: dict[str, np.ndarray] = {}
    for done, arm in enumerate(_SIGNS, start=1):
        solutions[arm], report["arms"][arm] = solve_arm(pool, scores, arm)
        progress.update(done)
    if config.solve.max_cost is not None:
        _hold_cost(pool, solutions, report["arms"], progress)
    plus = solutions["plus"]
    solutions["permuted"] = (dealt if units is None else units.dealt)(plus, kept_groups(pool), config.seed)
    report["arms"]["permuted"] = _dealt_entry(solutions["permuted"], config.solve.weight_max)
    share = report["arms"]["plus"]["effective_sample_share"]
    for name, control in control_weights(pool, scores, plus, share, progress).items():
        solutions[name] = control.weights
        if control.solution is None:
            of_weights = _dealt_entry(control.weights, config.solve.weight_max)
        else:
            of_weights = _weights_entry(control.solution, control.weights, config.solve.weight_max)
        report["arms"][name] = of_weights | control.report
    for arm, weights in solutions.items():
        outputs.append(run.path / "weights" / f"{arm}.parquet")
        write_weights(pool, outputs[-1], arm, weights)
    write_json(run.path / "weights" / "solution.json", report)
    return [*outputs, run.path / "weights" / "solution.json"]


def _hold_cost(pool: Pool, solutions: dict[str, np.ndarray], entries: dict[str, Any], progress: Progress) -> None:
    tables = {arm: f"weights/unscaled/{arm}.parquet" for arm in solutions}
    for arm, table in tables.items():
        write_weights(pool, pool.run.path / table, arm, solutions[arm])
    pool.run.publish(*(pool.run.path / table for table in tables.values()))
    for arm, cost in hold_cost(pool.config, pool.run, tables, progress).items():
        solutions[arm] = scale_arm(solutions[arm], entries[arm], cost)


@contextlib.contextmanager
def scored(pool: Pool, progress: Progress) -> Iterator[Scores]:
    """The targets' susceptibilities to every loss of the pool, by the estimator and at the level of section solve.

    They, and the weights of `solve_arm`, may lie in files that go when the block ends.

    Raises:
        PatterningError: too few chains, or another probe than the estimator needs.
    """
    settings, held_out = pool.config.solve, pool.subjects.held_out
    assert settings is not None
    observables = list(settings.targets) or list(held_out.names if held_out else ())
    try:
        scores = _SCORES[settings.scores](pool, observables, progress)
        yield at_level(scores, units_of(pool), pool.scratch / "units.npy")
    finally:
        shutil.rmtree(pool.scratch, ignore_errors=True)


def described(pool: Pool, scores: Scores) -> dict[str, Any]:
    """How the scores were come by and what the weights keep, for solution.json."""
    reliability = split_half_reliability(scores.per_chain)
    found = {
        **scores.report,
        "observables": scores.observables,
        "num_samples": len(scores.in_subset),
        "level": pool.config.solve.level if pool.config.solve else None,
        "reliability": dict(zip(scores.observables, reliability.tolist(), strict=True)),
        "replicates": {"of": scores.replicates, "number": len(scores.per_chain)},
    }
    if (groups := kept_groups(pool)) is None:
        return found
    assert pool.config.solve is not None
    arms = [*_SIGNS, "permuted", *(control.name for control in pool.config.solve.controls)]
    kept = {"of": pool.config.solve.keep_mass, "num_groups": int(groups.max()) + 1, "arms": arms}
    return found | {"kept_mass": kept}


def write_weights(pool: Pool, path: Path, arm: str, weights: np.ndarray) -> None:
    """A table of the weights of the pool's entries [entry]; below 0 labels are swapped."""
    index, key = pool.index, pool.subjects.task.key
    metadata = {"arm": arm, "subject": pool.subject}
    swapped = weights < 0 if (weights < 0).any() else None
    write_sample_weights(path, index[key], index.get("position"), np.abs(weights), metadata, key, swapped)


def _write_pool(pool: Pool, scores: Scores, units: Units | None) -> Path:
    """chi of every loss, or of every unit: the sum over its losses; its error is known where all of these were scored
    replicate by replicate."""
    num_chains = len(scores.per_chain)
    spread = scores.per_chain.std(axis=0, ddof=1) / num_chains**0.5 if num_chains > 1 else scores.per_chain[0] * np.nan
    tables = _of_losses(pool, scores, spread) if units is None else [_of_units(pool, scores, spread, units)]
    posterior = pool.subjects.posterior(pool.subject)
    metadata = {
        "subject": pool.subject,
        "estimator": scores.report["estimator"],
        "sign": SIGN,
        "units": f"chi and se: {scores.units}",
        "standard_error": f"spread between {scores.replicates}; measured on {len(pool.subset)} samples, null elsewhere",
        "inverse_temperature": posterior.inverse_temperature,
        "localization": posterior.localization,
        "num_training_losses": len(scores.in_subset),
        "level": units.level if units else "token" if "position" in pool.index else "sample",
    }
    path = pool.run.path / "response" / "pool.parquet"
    write_parquet_parts(path, tables, metadata)
    return path


def _of_losses(pool: Pool, scores: Scores, spread: np.ndarray) -> Iterator[pa.Table]:
    """Parts of the table, with the spread [observable, entry of the subset]."""
    start = done = 0
    for shard in scores.chi:
        for first in range(0, shard.shape[1], ROWS):
            chi = shard[:, first : first + ROWS]
            here = slice(start, start := start + chi.shape[1])
            measured = scores.in_subset[here]
            errors = spread[:, done : (done := done + int(measured.sum()))]
            columns = {name: values[here] for name, values in pool.index.items()}
            for name, row, error in zip(scores.observables, chi, errors, strict=True):
                columns |= {f"chi_{name}": row, f"se_{name}": _where(measured, error)}
            yield pa.table(columns)


def _of_units(pool: Pool, scores: Scores, spread: np.ndarray, units: Units) -> pa.Table:
    columns: dict[str, Any] = {"document" if units.level == "document" else pool.subjects.task.key: units.values}
    columns["num_losses"] = units.sizes
    measured = units.sums(scores.in_subset) == units.sizes
    for k, name in enumerate(scores.observables):
        columns[f"chi_{name}"] = units.sums(scores.row(k))
        of_losses = np.zeros(len(scores.in_subset), np.float32)
        of_losses[scores.in_subset] = spread[k]
        columns[f"se_{name}"] = pa.array(units.sums(of_losses), mask=~measured)
    return pa.table(columns)


def _where(measured: np.ndarray, error: np.ndarray) -> pa.Array:
    """Float32 column of the errors of what is measured, null elsewhere."""
    values = np.full(len(measured), np.nan, np.float32)
    values[measured] = error
    return pa.array(values, mask=~measured)


def solve_arm(pool: Pool, scores: Scores, arm: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Weights of plus or minus [entry], and what is predicted of them, for solution.json.

    Raises:
        PatterningError: an infeasible strength (the largest feasible one is named), or contradicting targets.
    """
    settings = pool.config.solve
    assert settings is not None
    target = _SIGNS[arm] * np.array([settings.targets.get(name, 0.0) for name in scores.observables])
    temperature = pool.inverse_temperature
    options: dict[str, Any] = {
        "inverse_temperature": temperature,
        "weight_min": settings.weight_min,
        "weight_max": settings.weight_max,
        "method": settings.method,
        "ridge": settings.ridge,
        "rank": settings.rank,
        "mode": settings.mode,
        "observables": scores.observables,
    }

    def solved(chi: Chi, groups: np.ndarray | None) -> WeightSolution:
        if settings.strength is not None:
            return solve_weights(chi, target, strength=settings.strength, groups=groups, **options)
        assert settings.effective_sample_share is not None  # one of the two is there, checked with the file
        return solve_for_effective_sample_share(chi, target, settings.effective_sample_share, groups=groups, **options)

    groups = kept_groups(pool)
    solution = solved(scores.chi, groups)
    weights = pool.keep(arm, solution.parts())
    in_subset = weights[scores.in_subset]
    predicted = predicted_response_with_error(scores.per_chain, in_subset, temperature)
    # The whole pool gives the value, the part that was scored chain by chain its error.
    predicted = replace(
        predicted,
        value=solution.predicted_response,
        interval=predicted.interval + (solution.predicted_response - predicted.value)[:, None],
    )
    of_subset = None if groups is None else groups[scores.in_subset]
    cross_fitted = cross_fitted_response(scores.per_chain, lambda chi: solved(chi, of_subset).weights, temperature)
    entry = {
        "target": dict(zip(scores.observables, target, strict=True)),
        "predicted_response": _by_observable(predicted, scores.observables),
        "cross_fitted_response": _by_observable(cross_fitted, scores.observables),
    }
    return weights, entry | _weights_entry(solution, weights, settings.weight_max)


def refuse_noise(whose: str, reliability: Mapping[str, float], settings: SolveConfig) -> None:
    """Weights made of noise look like any others, and retraining with them costs hours.

    Args:
        whose: an arm, or a round of one.
        reliability: observable -> split-half correlation of its scores.
        settings: which observables are targets, and what is asked of them.

    Raises:
        PatterningError: a target whose scores hardly repeat from one half of the replicates to the other.
    """
    for name, value in reliability.items():
        if settings.targets.get(name) and value < settings.min_reliability:  # NaN, with one replicate, is not
            raise PatterningError(
                f"solve.targets.{name}: its scores have a split-half reliability of {value:.2f}, so the weights of "
                f"{whose} would be noise; expected at least solve.min_reliability = {settings.min_reliability:g}: take "
                "more draws or chains, pool over samples, or choose other solve.scores"
            )


def _weights_entry(solution: WeightSolution, weights: np.ndarray, weight_max: float) -> dict[str, Any]:
    plain = ("strength", "largest_feasible_strength", "effective_sample_size", "effective_sample_share",
             "top_percent_share", "num_at_minimum", "num_at_maximum", "num_iterations", "num_passes",
             "residual")  # fmt: skip
    return _histogram(weights, weight_max) | {name: getattr(solution, name) for name in plain}


def _dealt_entry(weights: np.ndarray, weight_max: float) -> dict[str, Any]:
    """Of weights that are another's on other entries; units of several sizes change the share."""
    rho = weights.astype(np.float64)
    share = rho.sum() ** 2 / (len(rho) * np.square(rho).sum())
    return _histogram(weights, weight_max) | {"effective_sample_share": share}


def _histogram(weights: np.ndarray, weight_max: float) -> dict[str, Any]:
    counts, edges = np.histogram(weights, bins=_HISTOGRAM_BINS, range=(0.0, max(weight_max, 1.0)))
    return {"histogram": {"edges": edges, "counts": counts}}


def _by_observable(response: PredictedResponse, observables: list[str]) -> dict[str, Any]:
    return {
        name: {
            "value": response.value[k],
            "standard_error": response.standard_error[k],
            "interval": response.interval[k],
        }
        for k, name in enumerate(observables)
    }
