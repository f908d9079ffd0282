"""Stage ``solve``: responses at the references -> weights of the strings, for both rules and for every control."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.config.parentheses import ParenthesesConfig
from patterning_dist.data.parentheses import BracketStrings, read_split
from patterning_dist.files import read_parquet, write_json, write_parquet
from patterning_dist.progress import Progress
from patterning_dist.response.llc import free_energy_response, llc_response
from patterning_dist.response.moments import Floats
from patterning_dist.response.solver import WeightSolution, solve_for_effective_sample_share
from patterning_dist.response.two_rules import (
    mean_rows,
    reliability,
    reliability_between_solutions,
    shuffled_kinds,
    standardised,
    winsorised,
)
from patterning_dist.response.units import read_chains
from patterning_dist.rundir import RunDirectory
from patterning_dist.sampling.bracket_study import COMPONENT
from patterning_dist.stages.parentheses.references import NESTED, read_references

_SHUFFLES, _PERMUTATION = 0x73687566, 0x7065726D  # streams of the run's seed


@dataclass(frozen=True)
class Responses:
    """What the chains around the references say of every string.

    Attributes:
        kinds: 1 for NESTED, 0 for EQUAL-COUNT [solution].
        free_energy: rho_i <l_i - L> of the chains, nats [solution, chain, sample].
        llc: response of the LLC, direct term and covariance, nats [solution, chain, sample].
        loss: rho_i l_i(w*), nats [solution, sample].
    """

    kinds: np.ndarray
    free_energy: Floats
    llc: Floats
    loss: Floats


def solve(config: ParenthesesConfig, run: RunDirectory, progress: Progress) -> list[Path]:
    """Solve for the weights of every arm; returns the files written: weights/<arm>.parquet and solution.json."""
    strings = read_split(run.path / "data", "train", config.task.max_length)
    responses = read_responses(config, run)
    classes, kinds = strings.labels, responses.kinds
    by_solution = responses.free_energy.mean(axis=1)
    rng = np.random.default_rng([config.seed, _SHUFFLES])

    def toward_nested(rows: Floats, of_kinds: np.ndarray) -> Floats:
        mean = mean_rows(rows, of_kinds)
        # Odds of the first kind rise with -(dF_first - dF_second).
        return standardised(winsorised(mean[1] - mean[0], classes, config.weights.winsorise), classes)

    score = toward_nested(by_solution, kinds)
    contrast = toward_nested(responses.loss, kinds)
    scores = {"nested": score, "equal_count": -score, "loss_nested": contrast, "loss_equal_count": -contrast}
    for number in range(config.arms.num_shuffles):
        scores[f"shuffled_{number}"] = toward_nested(by_solution, shuffled_kinds(rng, kinds))
    solutions = {arm: _solved(config, values[None], [1.0], classes) for arm, values in scores.items()}
    rows = mean_rows(by_solution, kinds)
    for arm, target in (("minimum_norm_nested", [-1.0, 1.0]), ("minimum_norm_equal_count", [1.0, -1.0])):
        solutions[arm] = _solved(config, rows, target, classes)
    relative = {arm: solution.weights for arm, solution in solutions.items()}
    relative["permuted"] = _permuted(config.seed, relative["nested"], classes)
    written = [
        _write(run.path / "weights" / f"{arm}.parquet", strings, values, scores.get(arm))
        for arm, values in relative.items()
    ]
    checked = {}
    for strength in config.check.strengths:
        side = relative["nested" if strength > 0 else "equal_count"]
        name = f"strength_{strength:+g}"
        checked[name] = 1 + abs(strength) * (side - 1)
        written.append(_write(run.path / "weights" / f"{name}.parquet", strings, checked[name], None))
    n_beta = config.sampling.resolve(COMPONENT).inverse_temperature
    summary = {
        "reliability": _reliability(responses, classes),
        "arms": {
            arm: {
                "effective_sample_share": float(values.sum() ** 2 / (len(values) * (values @ values))),
                "largest_weight": float(values.max()),
                "predicted": _predicted(responses, values, n_beta),
            }
            for arm, values in (relative | checked).items()
        },
    }
    write_json(run.path / "weights" / "solution.json", summary)
    return [*written, run.path / "weights" / "solution.json"]


def read_responses(config: ParenthesesConfig, run: RunDirectory) -> Responses:
    """Responses of every healthy chain around every reference; a solution's chains are cut to the fewest of any."""
    references = read_references(run.path / "baseline")
    n_beta = config.sampling.resolve(COMPONENT).inverse_temperature
    free_energy, llc, loss = [], [], []
    for number, reference in enumerate(references):
        name = f"{reference.rule}-{number}"
        chains, _ = read_chains(run.path / "sampling" / name)
        table, _ = read_parquet(run.path / "response" / f"{name}.parquet", ("sample_id", "center_loss"))
        center = table["center_loss"].to_numpy().astype(np.float64)
        free_energy.append(free_energy_response(chains, center).chi_per_chain[:, 0])
        llc.append(llc_response(chains, 0, n_beta).chi_per_chain[:, 0])
        loss.append(center)
    fewest = min(map(len, free_energy))
    return Responses(
        kinds=np.array([reference.rule == NESTED for reference in references], int),
        free_energy=np.stack([chi[:fewest] for chi in free_energy]),
        llc=np.stack([chi[:fewest] for chi in llc]),
        loss=np.stack(loss),
    )


def _solved(config: ParenthesesConfig, rows: Floats, target: list[float], classes: np.ndarray) -> WeightSolution:
    """Bounded weights along the rows, the mass of either label kept, as strong as the effective share allows."""
    is_balanced = (classes > 0).astype(np.float64)[None]
    return solve_for_effective_sample_share(
        np.concatenate([rows / np.abs(rows).mean(), is_balanced]),
        [*target, 0.0],
        config.weights.effective_share,
        inverse_temperature=1.0,
        weight_min=config.weights.min_weight,
        weight_max=config.weights.max_weight,
    )


def _permuted(seed: int, weights: Floats, classes: np.ndarray) -> Floats:
    """The same weights dealt out anew within either label."""
    rng, result = np.random.default_rng([seed, _PERMUTATION]), weights.copy()
    for label in np.unique(classes):
        here = np.flatnonzero(classes == label)
        result[here] = weights[rng.permutation(here)]
    return result


def _write(file: Path, strings: BracketStrings, relative: Floats, score: Floats | None) -> Path:
    columns: dict[str, Any] = {
        "sample_id": np.arange(len(strings), dtype=np.int32),
        "text": strings.text,
        "label": strings.labels.astype(np.int8),
        "relative_weight": relative,
        "weight": strings.class_weights * relative,
    }
    if score is not None:
        columns["score"] = score
    metadata = {
        "relative_weight": "rho_i / rho_i in plain training, mean 1 within either label",
        "weight": "rho_i, with which strings are drawn",
    }
    write_parquet(file, pa.table(columns), metadata)
    return file


def _reliability(responses: Responses, classes: np.ndarray) -> dict[str, Any]:
    """Of the direction between the rules, from disjoint chains and from disjoint solutions."""
    kinds, found = responses.kinds, {}
    for name, chi in (("free_energy", responses.free_energy), ("llc", responses.llc)):
        entry: dict[str, Any] = {"between_solutions": reliability_between_solutions(chi.mean(axis=1), kinds, classes)}
        if chi.shape[1] > 1:
            halves = [mean_rows(chi[:, half::2].mean(axis=1), kinds) for half in (0, 1)]
            entry["between_chains"] = reliability(tuple(rows[1] - rows[0] for rows in halves), classes)
        found[name] = entry
    return found


def _predicted(responses: Responses, relative: Floats, n_beta: float) -> dict[str, Any]:
    """(n_beta / n) chi h for LLC and free energy, mean over the solutions of a rule, with their spread as error."""
    h = relative - 1
    found = {}
    for name, chi in (("free_energy", responses.free_energy), ("llc", responses.llc)):
        by_solution = n_beta / len(h) * (chi.mean(axis=1) @ h)
        for rule, kind in (("nested", 1), ("equal_count", 0)):
            values = by_solution[responses.kinds == kind]
            found[f"{name}_{rule}"] = {
                "value": float(values.mean()),
                "standard_error": float(values.std(ddof=1) / np.sqrt(len(values))),
                "per_solution": values,
            }
    return found
