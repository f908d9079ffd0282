"""Response directions and the scores of a whole pool along them, in parallel: durable tasks, under scores/."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import ray

from patterning_dist.progress import Progress
from patterning_dist.runtime.chains.workers import Result, model_workers
from patterning_dist.runtime.environment import ray_session
from patterning_dist.runtime.tasks import Start, Task, digest, run_tasks
from patterning_dist.runtime.workforce import Workforce
from patterning_dist.sampling.study import Study, open_study
from patterning_dist.storage.run import RunDirectory

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
    run: RunDirectory,
    component: str,
    position: np.ndarray,
    gradients: np.ndarray,
    subset: np.ndarray,
    progress: Progress,
) -> PoolScores:
    """Solve for the response direction of every chain and observable, then score probe, subset and pool.

    Args:
        study: of the run.
        run: holds the results of the tasks: what an earlier driver got done is not done again.
        component: whose free coordinates the vectors below have.
        position: w_bar, mean of the draws of all chains [coordinate].
        gradients: E[grad phi] of each chain [chain, observable, coordinate].
        subset: sequence ids of the pool to be scored chain by chain.
        progress: shows the tasks done.
    """
    num_chains, num_observables, _ = gradients.shape
    flat = gradients.reshape(num_chains * num_observables, -1)
    ids = np.arange(study.pool.num_sequences)
    shards = [ids[start : start + SHARD_SEQUENCES] for start in range(0, len(ids), SHARD_SEQUENCES)]
    sampling, make_study = study.config.sampling, partial(open_study, study.config, run.place)
    inputs = digest(
        {"position": position},
        {
            "sample": run.manifest["stages"]["sample"]["fingerprint"],  # and so data, checkpoint, posterior
            "settings": study.config.response.direction.model_dump(mode="json"),
            "component": component,
            "device": study.device,
        },
    )
    with contextlib.ExitStack() as resources:
        # Ray starts, and copies of large vectors are made, when the first task that is not done needs them.
        @cache
        def workers() -> Workforce:
            resources.enter_context(ray_session(sampling.threads_per_worker))
            return resources.enter_context(model_workers(make_study, sampling, study.device, len(shards), progress))

        at = cache(lambda: ray.put(position))

        def run_all(label: str, tasks: list[Task]) -> list[Result]:
            return run_tasks(tasks, run, lambda number: workers(), progress, label, what=f"tasks of {label}")

        def solve(name: str, gradient: np.ndarray) -> Task:
            return _task(
                name,
                digest({"gradient": gradient}, {"inputs": inputs}),
                lambda worker, board: worker.direction.remote(component, at(), gradient),
            )

        solved = run_all("response directions", [solve(f"direction-{n}", gradient) for n, gradient in enumerate(flat)])
        directions = np.stack([solution.pop("direction") for solution in solved])

        def score(name: str, parts: list[np.ndarray], along: np.ndarray) -> list[Task]:
            vectors, of_vectors = cache(lambda: ray.put(along)), digest({"directions": along}, {"inputs": inputs})
            probe = name == "probe"
            return [
                _task(
                    f"{name}-{number}",
                    digest({"ids": part}, {"directions": of_vectors, "probe": probe}),
                    lambda worker, board, part=part: worker.score.remote(component, at(), vectors(), part, probe),
                )
                for number, part in enumerate(parts)
            ]

        tasks = score("probe", [study.probe_ids], directions)
        tasks += score("subset", np.array_split(subset, SUBSET_TASKS), directions)
        tasks += score("pool", shards, directions.reshape(gradients.shape).mean(axis=0))
        probe, *parts = run_all("scoring the pool", tasks)
    scores = [part["scores"] for part in parts]
    return PoolScores(
        pool=np.concatenate(scores[SUBSET_TASKS:], axis=1).reshape(num_observables, -1),
        subset=np.concatenate(scores[:SUBSET_TASKS], axis=1).reshape(num_chains, num_observables, -1),
        probe=probe["scores"].reshape(num_chains, num_observables, *probe["scores"].shape[1:]),
        solves=solved,
    )


def _task(name: str, fingerprint: str, start: Start) -> Task:
    return Task(name, f"scores/{name}.npz", fingerprint, start)
