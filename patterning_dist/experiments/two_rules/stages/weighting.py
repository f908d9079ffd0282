"""From scores of the strings to their weights, and the tables of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.experiments.two_rules.config import ParenthesesConfig
from patterning_dist.experiments.two_rules.strings import BracketStrings
from patterning_dist.response.moments import Floats
from patterning_dist.response.solver import solve_for_effective_sample_share
from patterning_dist.storage.files import write_parquet
from patterning_dist.training.stacked import Phase

PLAIN = "data/weights.parquet"  # of the strings in plain training
_PERMUTATION = 0x7065726D  # stream of the run's seed


def weights_along(config: ParenthesesConfig, rows: Floats, target: list[float], classes: np.ndarray) -> Floats:
    """Bounded relative weights along rows, as strong as the effective share allows [sample].

    Args:
        config: of the run.
        rows: what the weights are to move [row, sample].
        target: wanted change of each row, up to a common factor.
        classes: labels [sample]; the mass of either is kept.
    """
    is_balanced = (classes > 0).astype(np.float64)[None]
    return solve_for_effective_sample_share(
        np.concatenate([rows / np.abs(rows).mean(), is_balanced]),
        [*target, 0.0],
        config.weights.effective_share,
        inverse_temperature=1.0,
        weight_min=config.weights.min_weight,
        weight_max=config.weights.max_weight,
    ).weights


def permuted(seed: int, weights: Floats, classes: np.ndarray) -> Floats:
    """The same weights dealt out again within either label."""
    rng, result = np.random.default_rng([seed, _PERMUTATION]), weights.copy()
    for label in np.unique(classes):
        here = np.flatnonzero(classes == label)
        result[here] = weights[rng.permutation(here)]
    return result


def write_weights(file: Path, strings: BracketStrings, relative: Floats, score: Floats | None = None) -> Path:
    """Write the weights of all strings, and the score that they follow if it is one; returns the file."""
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


def two_phases(config: ParenthesesConfig, strings: BracketStrings, weights: Floats) -> list[Phase]:
    """First the weights rho [sample], then plain ones, so that all training strings are learnt."""
    until = round(config.arms.reweighted_share * config.training.num_steps)
    return [Phase(until, weights), Phase(config.training.num_steps, strings.class_weights)]
