"""Response directions and the scores of a whole pool along them, in parallel: durable tasks, under scores/.

On a chain group every rank solves for its own part of a direction and keeps it in a file of its own: vectors as long as
the model has coordinates are nowhere whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np

from patterning_dist.aggregation.files import rank_part, read_gradients
from patterning_dist.config import SamplingConfig
from patterning_dist.config.response import DirectionConfig
from patterning_dist.models.components import Vector
from patterning_dist.progress import Progress
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.chains.groups import chain_workers
from patterning_dist.runtime.chains.workers import MakeStudy, Result
from patterning_dist.runtime.environment import ray_session
from patterning_dist.runtime.tasks import Task, digest, run_tasks
from patterning_dist.runtime.workforce import Workforce
from patterning_dist.sampling.direction import directional_losses, response_direction
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samples import Part, Samples
from patterning_dist.sampling.statistics import flatten, unflatten
from patterning_dist.sampling.target import Target
from patterning_dist.storage.run import RunDirectory
from patterning_dist.storage.snapshots import Snapshots, pack, unpack
from patterning_dist.storage.store import Storage

SHARD_SAMPLES = 256  # pool samples a task: seconds of work, so that the last tasks do not leave workers idle
SUBSET_TASKS = 4
_PREPARED = 256  # samples whose frozen layers are held at once


class Scored(Protocol):
    """What a worker needs of the subjects of an experiment."""

    ranks: Ranks

    def target(self, name: str) -> Target: ...
    def posterior(self, name: str) -> Posterior: ...
    def source(self, name: str, which: str) -> Samples: ...
    def hessian_ids(self, num_samples: int) -> np.ndarray: ...
    def entries_of(self, which: str, ids: np.ndarray, losses: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Solved:
    """Which directions there are; goes to the workers.

    Attributes:
        storage: of the run.
        subject: whose posterior they are taken from.
        inputs: hash of all that its chains follow from.
        chains: numbers of the healthy ones.
        rows: of the split losses among the gradients.
        settings: section of the experiment.
    """

    storage: Storage
    subject: str
    inputs: str
    chains: tuple[int, ...]
    rows: tuple[int, ...]
    settings: DirectionConfig

    def position_and_gradients(self, subjects: Scored, target: Target) -> tuple[Vector, np.ndarray]:
        """w_bar, mean of the draws of all chains; E[grad phi] of each [chain, observable, coordinate of this rank]."""
        ranks = subjects.ranks
        means = read_gradients(self.storage, self.subject, self.chains, ranks.rank, ranks.size)
        return unflatten(means[:, 0].mean(axis=0), target.center), means[:, [1 + row for row in self.rows]]

    def store(self, number: int, ranks: Ranks) -> Snapshots:
        """Where this rank keeps its part of a direction."""
        folder = f"scores/{self.subject}/directions"
        return Snapshots(self.storage, folder, rank_part(number, ranks.rank, ranks.size))

    def directions(self, ranks: Ranks) -> np.ndarray:
        """All of them, this rank's part [chain, observable, coordinate]."""
        found = []
        for number in range(len(self.chains) * len(self.rows)):
            stored = self.store(number, ranks).newest()
            assert stored is not None, f"direction {number} is gone"
            found.append(unpack(stored[1])["direction"])
        return np.stack(found).reshape(len(self.chains), len(self.rows), -1)


@dataclass(frozen=True)
class PoolScores:
    """-grad l_i(w_bar) . c_phi of the entries that count, not yet centred, nats squared.

    Attributes:
        pool: along the mean direction of the chains [observable, entry].
        subset: part of the pool, along every chain's own direction [chain, observable, entry].
        probe: the probe, likewise [chain, observable, entry].
        solves: how conjugate gradients ended for every chain and observable.
    """

    pool: np.ndarray
    subset: np.ndarray
    probe: np.ndarray
    solves: list[dict[str, Any]]


def score_pool(
    opener: MakeStudy,
    sampling: SamplingConfig,
    device: str,
    run: RunDirectory,
    solved: Solved,
    num_samples: tuple[int, int],
    subset: np.ndarray,
    progress: Progress,
) -> PoolScores:
    """Solve for the response direction of every chain and observable, then score probe, subset and pool.

    Args:
        opener: opens the subjects in a worker.
        sampling: section of the experiment.
        device: of the workers.
        run: holds the results, so that what an earlier driver got done is kept.
        solved: which directions.
        num_samples: of the pool, and of the probe.
        subset: sample ids of the pool to be scored chain by chain.
        progress: shows the tasks done.
    """
    num_directions = len(solved.chains) * len(solved.rows)
    ids = np.arange(num_samples[0])
    shards = [ids[start : start + SHARD_SAMPLES] for start in range(0, len(ids), SHARD_SAMPLES)]
    inputs = digest(
        {},
        {
            "chains": solved.inputs,  # and so data, checkpoint, posterior
            "settings": solved.settings.model_dump(mode="json"),
            "subject": [solved.subject, list(solved.chains), list(solved.rows)],
            "device": device,
            "ranks": sampling.ranks_per_chain,
        },
    )
    grouped = sampling.ranks_per_chain > 1
    with contextlib.ExitStack() as resources:

        @cache  # Ray starts when the first task that is not done needs it
        def workers() -> Workforce:
            resources.enter_context(ray_session(sampling.threads_per_worker))
            return resources.enter_context(chain_workers(opener, sampling, device, len(shards), progress))

        def task(name: str, what: Any, function: Callable[..., Result], *arguments: Any) -> Task:
            def start(worker: ActorHandle, board: ActorHandle) -> Any:
                if grouped:
                    return worker.everywhere.remote(f"in {name}", function, solved, *arguments)
                return worker.__ray_call__.remote(function, solved, *arguments)

            file = f"scores/{solved.subject}/{name}.npz"
            return Task(name, file, digest({}, {"inputs": inputs, "what": what}), start)

        def run_all(label: str, tasks: list[Task]) -> list[Result]:
            return run_tasks(tasks, run, lambda number: workers(), progress, label, what=f"tasks of {label}")

        solves = run_all("response directions", [task(f"direction-{n}", n, _solve, n) for n in range(num_directions)])

        def score(name: str, which: str, parts: list[np.ndarray], mean: bool) -> list[Task]:
            return [
                task(f"{name}-{number}", [which, part.tolist(), mean], _score, which, part, mean)
                for number, part in enumerate(parts)
            ]

        tasks = score("probe", "probe", [np.arange(num_samples[1])], False)
        tasks += score("subset", "pool", np.array_split(subset, SUBSET_TASKS), False)
        tasks += score("pool", "pool", shards, True)
        probe, *parts = (result["scores"] for result in run_all("scoring the pool", tasks))
    each = (len(solved.chains), len(solved.rows), -1)
    return PoolScores(
        pool=np.concatenate(parts[SUBSET_TASKS:], axis=1),
        subset=np.concatenate(parts[:SUBSET_TASKS], axis=1).reshape(each),
        probe=probe.reshape(each),
        solves=solves,
    )


def _solve(worker: Any, solved: Solved, number: int) -> Result:
    """c_phi = Sigma E[grad phi] of one chain and observable, kept by every rank; how conjugate gradients ended."""
    subjects: Scored = worker.study
    target = subjects.target(solved.subject)
    position, gradients = solved.position_and_gradients(subjects, target)
    target.place(position)
    settings = solved.settings
    solution = response_direction(
        target,
        subjects.posterior(solved.subject),
        unflatten(gradients.reshape(-1, gradients.shape[-1])[number], target.center),
        target.prepare(target.data, subjects.hessian_ids(settings.hessian_sequences)),
        max_iterations=settings.conjugate_gradient_iterations,
        tolerance=settings.tolerance,
    )
    solved.store(number, subjects.ranks).write(1, pack({"direction": flatten(solution.vector).numpy()}))
    return {
        "num_iterations": solution.num_iterations,
        "relative_residual": solution.relative_residual,
        "negative_curvature": solution.negative_curvature,
    }


def _score(worker: Any, solved: Solved, which: str, ids: np.ndarray, mean: bool) -> Result:
    """-grad l_i(w_bar) . c of the entries of pool or probe samples, ``scores`` float32 [direction, entry].

    Args:
        which: ``pool`` or ``probe``.
        ids: samples of it.
        mean: along the mean of the chains' directions, one an observable, instead of along every one.
    """
    subjects: Scored = worker.study
    target = subjects.target(solved.subject)
    position, _ = solved.position_and_gradients(subjects, target)
    step = solved.settings.step * target.dot(position, position) ** 0.5
    directions = solved.directions(subjects.ranks)
    along = directions.mean(axis=0) if mean else directions.reshape(-1, directions.shape[-1])
    parts = []
    for start in range(0, len(ids), _PREPARED):
        here = ids[start : start + _PREPARED]
        samples = target.prepare(Part(subjects.source(solved.subject, which), here))
        scores = [
            directional_losses(target, samples, position, unflatten(c, target.center), step=step).float().numpy()
            for c in along
        ]
        parts.append(subjects.entries_of(which, here, np.stack(scores)))
    return {"scores": np.concatenate(parts, axis=1)}
