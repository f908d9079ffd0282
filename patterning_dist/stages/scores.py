"""Susceptibilities of every token of the training pool, and their spread over chains on a part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from patterning_dist.aggregation.files import read_chains, read_gradients
from patterning_dist.data.induction import token_features
from patterning_dist.data.sampler import permutation
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.response.extrapolate import Extrapolation, extrapolate
from patterning_dist.response.reliability import bootstrap_correlation
from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.runtime.pool import score_pool
from patterning_dist.sampling.study import Study
from patterning_dist.stages.susceptibilities import token_columns
from patterning_dist.storage.run import RunDirectory

# Pool sequences that are scored chain by chain: errors of sums over the pool come from the spread between chains, and a
# part of the pool shows that as well as all of it.
SEQUENCES_BY_CHAIN = 1024
_SUBSET_STREAM = 0x737562


@dataclass(frozen=True)
class Scores:
    """chi of the pool, and how it was come by.

    Attributes:
        chi: [observable, sample], nats squared, mean over chains; every row has mean zero.
        subset: sequence ids of the part of the pool that was also scored chain by chain, ascending.
        per_chain: chi of that part from each chain alone [chain, observable, sample of the subset], rows with mean 0.
        observables: names of the rows.
        report: how well it went, for solution.json.
    """

    chi: np.ndarray
    subset: np.ndarray
    per_chain: np.ndarray
    observables: list[str]
    report: dict[str, Any]


def direction_scores(study: Study, run: RunDirectory, progress: Progress, observables: list[str]) -> Scores:
    """The response-direction estimator (see ``sampling.direction``) over the whole pool.

    Every healthy chain gives a direction of its own. The pool is scored along their mean, two forward passes an
    observable; the probe (to compare with the plain covariance) and a part of the pool (for the errors) chain by chain.

    Raises:
        PatterningError: an observable is not a split loss, so no gradients of it were taken.
    """
    config = study.config
    component = config.solve.component
    splits = list(study.splits.names)
    for name in observables:
        if name not in splits:
            raise PatterningError(
                f"solve.targets: {name} is not a split loss, and the response direction needs gradients; "
                f"use one of {', '.join(splits)}, or solve.scores: regression"
            )
    healthy, _ = read_chains(run.path / "sampling" / component)
    sums = read_gradients(run.path / "sampling" / component, [moments.chain for moments in healthy])
    position = sums[:, 0].mean(axis=0)
    rows = [1 + splits.index(name) for name in observables]
    subset = _subset(study)
    found = score_pool(study, run, component, position, sums[:, rows], subset, progress)
    report = {
        "estimator": "response_direction",
        "conjugate_gradients": found.solves,
        "estimator_agreement": _agreement(study, run, found.probe.mean(axis=0), observables),
    }
    return Scores(_centred(found.pool), subset, _centred(found.subset), observables, report)


def regression_scores(study: Study, run: RunDirectory, progress: Progress, observables: list[str]) -> Scores:
    """Plain covariances of the probe, carried to the pool by regression on token features.

    Raises:
        PatterningError: too few chains or probe sequences.
    """
    config = study.config
    progress.start("extrapolating from the probe", len(observables))
    healthy, excluded = read_chains(run.path / "sampling" / config.solve.component)
    rows = [study.observable_names.index(name) for name in observables]
    num_tokens = study.probe_tokens[:, 1:].size
    tokens = study.pool.tokens(np.arange(study.pool.num_sequences))
    counts = np.bincount(tokens.ravel(), minlength=study.pool.vocabulary_size)
    # Pool and probe together: bigram counts are then the same for both.
    features, _ = token_features(np.concatenate([study.probe_tokens, tokens]), counts)
    groups = np.repeat(study.probe_ids, study.probe_tokens.shape[1] - 1)
    measured = susceptibility(
        healthy, loss_weights=token_columns(study), min_chains=config.sampling.min_chains, excluded=excluded
    )
    subset = _subset(study)
    in_subset = features[num_tokens:].reshape(len(tokens), -1, features.shape[1])[subset].reshape(-1, features.shape[1])
    chi, correlations = [], {}
    per_chain = np.empty((len(healthy), len(observables), len(in_subset)), np.float32)
    for k, (name, row) in enumerate(zip(observables, rows, strict=True)):

        def reach(scores: np.ndarray, pool_features: np.ndarray) -> Extrapolation:
            return extrapolate(features[:num_tokens], scores, groups, pool_features, seed=config.seed)

        found = reach(measured.chi[row, :num_tokens], features[num_tokens:])
        chi.append(found.predictions)
        correlations[name] = found.correlation._asdict()
        for c in range(len(healthy)):
            per_chain[c, k] = reach(measured.chi_per_chain[c, row, :num_tokens], in_subset).predictions
        progress.update(k + 1)
    report = {"estimator": "regression", "held_out_correlation": correlations}
    return Scores(_centred(np.array(chi, np.float32)), subset, _centred(per_chain), observables, report)


def _subset(study: Study) -> np.ndarray:
    order = permutation(study.config.seed, _SUBSET_STREAM, study.pool.num_sequences)
    return np.sort(order[:SEQUENCES_BY_CHAIN])


def _centred(chi: np.ndarray) -> np.ndarray:
    """l_i - L instead of l_i: L is the mean over the pool, so every row has mean zero."""
    return (chi - chi.mean(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def _agreement(study: Study, run: RunDirectory, probe: np.ndarray, observables: list[str]) -> dict[str, Any]:
    """Correlation of the two estimators on the probe, over tokens and over sequence means, intervals by sequence."""
    component = study.config.solve.component
    folder = run.path / "response"
    tokens = pq.read_table(folder / f"susceptibility-{component}.parquet")
    sequences = pq.read_table(folder / f"susceptibility-{component}-sequences.parquet")
    groups = tokens["sequence_id"].to_numpy()
    result = {}
    for k, name in enumerate(observables):
        by_token = bootstrap_correlation(tokens[f"chi_{name}"].to_numpy(), probe[k].ravel(), groups, 0)
        by_sequence = bootstrap_correlation(
            sequences[f"chi_{name}"].to_numpy(), probe[k].mean(axis=1), sequences["sequence_id"].to_numpy(), 0
        )
        result[name] = {
            "correlation_tokens": by_token.value,
            "interval_tokens": [by_token.low, by_token.high],
            "correlation_sequences": by_sequence.value,
            "interval_sequences": [by_sequence.low, by_sequence.high],
        }
    return result
