"""Susceptibilities of every token of the training pool, from two disjoint halves of the chains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray

from patterning_dist.data.induction import token_features
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.response.extrapolate import extrapolate
from patterning_dist.response.ledger import read_chains
from patterning_dist.response.reliability import bootstrap_correlation
from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.rundir import RunDirectory
from patterning_dist.runtime.environment import ray_session
from patterning_dist.runtime.workers import model_workers, run_tasks
from patterning_dist.sampling.study import Study

_SHARD = 256  # pool sequences a task: seconds of work, so that the last tasks do not leave workers idle


@dataclass(frozen=True)
class Scores:
    """chi of the pool from either half of the chains [half, observable, sample], and how it was come by."""

    per_half: np.ndarray
    observables: list[str]
    report: dict[str, Any]


def direction_scores(study: Study, run: RunDirectory, progress: Progress, observables: list[str]) -> Scores:
    """The response-direction estimator (see ``sampling.direction``) over the whole pool.

    Every healthy chain gives a direction of its own, which is used on the probe for the comparison with the plain
    covariance; the pool is scored along the mean directions of the two halves of the chains.

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
    with np.load(run.path / "sampling" / component / "arrays.npz") as arrays:
        sums = np.stack([arrays[f"{moments.chain}/sums"] for moments in healthy])  # chain, 1 + split, coordinate
    position = sums[:, 0].mean(axis=0)
    rows = [1 + splits.index(name) for name in observables]
    num_chains, num_observables = len(healthy), len(observables)
    ids = np.arange(study.pool.num_sequences)
    shards = [ids[start : start + _SHARD] for start in range(0, len(ids), _SHARD)]
    with ray_session(config.sampling.threads_per_worker):
        workers = model_workers(config, run.path, len(shards))

        def together(label: str, calls: list[Callable]) -> list[Any]:
            progress.start(label, len(calls))
            return run_tasks(workers, calls, lambda results: progress.update(sum(r is not None for r in results)))

        solved = together(
            "response directions",
            [
                lambda worker, gradient=sums[c, row]: worker.direction.remote(component, position, gradient)
                for c in range(num_chains)
                for row in rows
            ],
        )
        directions = np.stack([flat for flat, _ in solved]).reshape(num_chains, num_observables, -1)
        halves = np.concatenate([directions[0::2].mean(axis=0), directions[1::2].mean(axis=0)])
        shared = ray.put(halves)
        parts = together(
            "scoring the pool",
            [lambda worker, part=part: worker.score.remote(component, position, shared, part) for part in shards],
        )
        every = directions.reshape(num_chains * num_observables, -1)
        (probe,) = together(
            "scoring the probe",
            [lambda worker: worker.score.remote(component, position, every, study.probe_ids, probe=True)],
        )
    chi = np.concatenate(parts, axis=1).reshape(2, num_observables, -1)
    probe = probe.reshape(num_chains, num_observables, *probe.shape[1:])
    report = {
        "estimator": "response_direction",
        "conjugate_gradients": [r for _, r in solved],
        "estimator_agreement": _agreement(study, run, probe.mean(axis=0), observables),
    }
    return Scores(_centred(chi), observables, report)


def regression_scores(study: Study, run: RunDirectory, progress: Progress, observables: list[str]) -> Scores:
    """Plain covariances of the probe, carried to the pool by regression on token features.

    Raises:
        PatterningError: too few chains or probe sequences.
    """
    config = study.config
    progress.start("extrapolating from the probe", 2 * len(observables))
    healthy, excluded = read_chains(run.path / "sampling" / config.solve.component)
    rows = [study.observable_names.index(name) for name in observables]
    num_tokens = study.probe_tokens[:, 1:].size
    tokens = study.pool.tokens(np.arange(study.pool.num_sequences))
    counts = np.bincount(tokens.ravel(), minlength=study.pool.vocabulary_size)
    # Pool and probe together: bigram counts are then the same for both.
    features, _ = token_features(np.concatenate([study.probe_tokens, tokens]), counts)
    groups = np.repeat(study.probe_ids, study.probe_tokens.shape[1] - 1)
    halves, correlations = [], {name: [] for name in observables}
    for half in (healthy[0::2], healthy[1::2]):
        measured = susceptibility(half, min_chains=1, excluded=excluded)
        predicted = []
        for name, row in zip(observables, rows, strict=True):
            chi = measured.chi[row, :num_tokens]
            found = extrapolate(features[:num_tokens], chi, groups, features[num_tokens:], seed=config.seed)
            predicted.append(found.predictions)
            correlations[name].append(found.correlation._asdict())
            progress.update(len(halves) * len(observables) + len(predicted))
        halves.append(predicted)
    report = {"estimator": "regression", "held_out_correlation": correlations}
    return Scores(_centred(np.array(halves, np.float32)), observables, report)


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
