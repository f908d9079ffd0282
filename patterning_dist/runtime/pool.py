"""Response directions and the scores of a whole pool along them, in parallel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray

from patterning_dist.progress import Progress
from patterning_dist.runtime.chains.workers import model_workers
from patterning_dist.runtime.environment import ray_session
from patterning_dist.sampling.study import Study, open_study
from patterning_dist.storage.mirror import Place

SHARD_SEQUENCES = 256  # pool sequences a task: seconds of work, so that the last tasks do not leave workers idle
SUBSET_TASKS = 4


@dataclass(frozen=True)
class PoolScores:
    """-grad l_i(w_bar) . c_phi, not yet centred, nats squared.

    Attributes:
        pool: along the mean direction of the chains [observable, sample].
        subset: part of the pool, along every chain's own direction [chain, observable, sample].
        probe: the probe, likewise [chain, observable, sequence, position].
        solves: how conjugate gradients ended for every chain and observable.
    """

    pool: np.ndarray
    subset: np.ndarray
    probe: np.ndarray
    solves: list[dict[str, Any]]


def score_pool(
    study: Study,
    place: Place,
    component: str,
    position: np.ndarray,
    gradients: np.ndarray,
    subset: np.ndarray,
    progress: Progress,
) -> PoolScores:
    """Solve for the response direction of every chain and observable, then score probe, subset and pool.

    Args:
        study: of the run.
        place: of the run.
        component: whose free coordinates the vectors below have.
        position: w_bar, mean of the draws of all chains [coordinate].
        gradients: E[grad phi] of each chain [chain, observable, coordinate].
        subset: sequence ids of the pool to be scored chain by chain.
        progress: shows the tasks done.
    """
    num_chains, num_observables, _ = gradients.shape
    ids = np.arange(study.pool.num_sequences)
    shards = [ids[start : start + SHARD_SEQUENCES] for start in range(0, len(ids), SHARD_SEQUENCES)]
    sampling, make_study = study.config.sampling, partial(open_study, study.config, place)
    with (
        ray_session(sampling.threads_per_worker),
        model_workers(make_study, sampling, study.device, len(shards), progress) as workers,
    ):

        def together(label: str, calls: list[Callable]) -> list[Any]:
            progress.start(label, len(calls))
            return workers.run(calls, lambda results: progress.update(sum(r is not None for r in results)))

        solved = together(
            "response directions",
            [
                lambda worker, gradient=gradient: worker.direction.remote(component, position, gradient)
                for gradient in gradients.reshape(num_chains * num_observables, -1)
            ],
        )
        directions = np.stack([flat for flat, _ in solved])
        every, mean = ray.put(directions), ray.put(directions.reshape(gradients.shape).mean(axis=0))
        calls = [lambda worker: worker.score.remote(component, position, every, study.probe_ids, probe=True)]
        for along, parts in ((every, np.array_split(subset, SUBSET_TASKS)), (mean, shards)):
            calls += [
                lambda worker, along=along, part=part: worker.score.remote(component, position, along, part)
                for part in parts
            ]
        probe, *parts = together("scoring the pool", calls)
    return PoolScores(
        pool=np.concatenate(parts[SUBSET_TASKS:], axis=1).reshape(num_observables, -1),
        subset=np.concatenate(parts[:SUBSET_TASKS], axis=1).reshape(num_chains, num_observables, -1),
        probe=probe.reshape(num_chains, num_observables, *probe.shape[1:]),
        solves=[solve for _, solve in solved],
    )
