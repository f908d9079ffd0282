"""Response directions and the scores of a whole pool along them.

On a chain group every rank solves for its own part of a direction and keeps it in a file of its own: vectors as long as
the model has coordinates are nowhere whole.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patterning_dist.aggregation.files import rank_part, read_gradients
from patterning_dist.config.response import DirectionConfig
from patterning_dist.models.components import Vector
from patterning_dist.response.columns import StoredShard
from patterning_dist.runtime.pool import SUBSET_TASKS, Call, RunCalls, Scored, pool_shards, score_parts, store_columns
from patterning_dist.runtime.tasks import Result
from patterning_dist.sampling.direction import directional_losses, response_direction
from patterning_dist.sampling.layered import Prepared
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.statistics import flatten, unflatten
from patterning_dist.sampling.target import Target
from patterning_dist.storage.snapshots import Snapshots, pack, unpack
from patterning_dist.storage.store import Storage


@dataclass(frozen=True)
class Solved:
    """Which directions there are; goes to the workers.

    Attributes:
        storage: of the run.
        subject: whose posterior they are taken from.
        chains: numbers of the healthy ones.
        rows: of the split losses among the gradients.
        settings: section of the experiment.
    """

    storage: Storage
    subject: str
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
    """-grad l_i(w_bar) . c_phi of the entries that count, nats squared.

    Attributes:
        pool: along the mean direction of the chains [observable, entry], in shards, less the mean of every row.
        subset: part of the pool, along every chain's own direction [chain, observable, entry].
        probe: the probe, likewise [chain, observable, entry].
        solves: how conjugate gradients ended for every chain and observable.
    """

    pool: list[StoredShard]
    subset: np.ndarray
    probe: np.ndarray
    solves: list[dict[str, Any]]


def score_along_directions(
    run_calls: RunCalls, solved: Solved, num_samples: tuple[int, int], subset: np.ndarray, folder: Path
) -> PoolScores:
    """Solve for the response direction of every chain and observable, then score probe, subset and pool.

    Args:
        run_calls: see ``runtime.pool.pool_tasks``.
        solved: which directions.
        num_samples: of the pool, and of the probe.
        subset: sample ids of the pool to be scored chain by chain.
        folder: for the scores of the pool, which may be more than this process can hold.
    """
    common = [solved.settings.model_dump(mode="json"), list(solved.chains), list(solved.rows)]

    def score(name: str, which: str, parts: list[np.ndarray], mean: bool) -> list[Call]:
        return [
            Call(
                solved.subject,
                f"{name}-{number}",
                [*common, which, part.tolist(), mean],
                _score,
                (solved, which, part, mean),
            )
            for number, part in enumerate(parts)
        ]

    num_directions = len(solved.chains) * len(solved.rows)
    calls = [Call(solved.subject, f"direction-{n}", [*common, n], _solve, (solved, n)) for n in range(num_directions)]
    solves = list(run_calls("response directions", calls))
    calls = score("probe", "probe", [np.arange(num_samples[1])], False)
    calls += score("subset", "pool", np.array_split(subset, SUBSET_TASKS), False)
    calls += score("pool", "pool", pool_shards(num_samples[0]), True)
    scores = (result["scores"] for result in run_calls("scoring the pool", calls))
    each, probe = (len(solved.chains), len(solved.rows), -1), next(scores)
    parts = list(itertools.islice(scores, SUBSET_TASKS))
    return PoolScores(
        pool=store_columns(scores, folder),
        subset=np.concatenate(parts, axis=1).reshape(each),
        probe=probe.reshape(each),
        solves=solves,
    )


def _solve(worker: Any, solved: Solved, number: int) -> Result:
    """c_phi = Sigma E[grad phi] of one chain and observable, kept by every rank; how conjugate gradients ended."""
    subjects: Scored = worker.study
    target = subjects.target(solved.subject)
    position, gradients = solved.position_and_gradients(subjects, target)
    target.move_to(position)
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
    return solution.ended


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

    def score(samples: Prepared) -> np.ndarray:
        vectors = (unflatten(c, target.center) for c in along)
        return np.stack([directional_losses(target, samples, position, c, step=step).numpy() for c in vectors])

    return score_parts(subjects, target, solved.subject, which, ids, score)
