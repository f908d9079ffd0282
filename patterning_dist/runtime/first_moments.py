"""First moments of every loss of a pool under the posterior of a component, replicate by replicate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patterning_dist.aggregation.files import read_positions
from patterning_dist.models.components import Vector, scaled
from patterning_dist.runtime.pool import SUBSET_TASKS, Call, RunCalls, Scored, pool_shards, score_parts
from patterning_dist.runtime.tasks import Result
from patterning_dist.sampling.first_moment import antithetic_pair, mean_rises
from patterning_dist.sampling.layered import Prepared
from patterning_dist.sampling.statistics import unflatten
from patterning_dist.sampling.target import Target
from patterning_dist.storage.store import Storage


@dataclass(frozen=True)
class Draws:
    """Where the losses of a pool are taken; goes to the workers.

    Attributes:
        storage: of the run.
        subject: whose component is disturbed.
        chains: whose kept draws they are, a replicate a chain; none: chain-free draws.
        num_pairs: of chain-free draws, a replicate a pair; 0: one replicate, where the component is 0.
    """

    storage: Storage
    subject: str
    chains: tuple[int, ...] = ()
    num_pairs: int = 0

    @property
    def name(self) -> str:
        """Of files."""
        return "moment" if self.num_pairs else "chain-moment" if self.chains else "ablation"

    def groups(self, subjects: Scored, target: Target) -> Sequence[Iterable[Vector]]:
        """Positions of this rank, replicate by replicate."""
        if self.chains:
            ranks = subjects.ranks
            kept = read_positions(self.storage, self.subject, self.chains, ranks.rank, ranks.size)
            return [(unflatten(position, target.center) for position in of_chain) for of_chain in kept]
        gamma = subjects.posterior(self.subject).localization
        if self.num_pairs:
            return [antithetic_pair(target, n, seed=subjects.seed, gamma=gamma) for n in range(self.num_pairs)]
        return [[scaled(0.0, target.center)]]


def probe_rises(run_calls: RunCalls, draws: Sequence[Draws], num_samples: int) -> list[float]:
    """Mean rise of the losses of the probe under each of the draws, nats.

    Args:
        run_calls: see ``runtime.pool.pool_tasks``.
        draws: around one component each.
        num_samples: of the probe.
    """
    ids = np.arange(num_samples)
    calls = [_call(each, f"{each.name}-probe", "probe", ids, True) for each in draws]
    return [float(result["scores"].mean()) for result in run_calls("first moments of the probe", calls)]


def pool_rises(
    run_calls: RunCalls, draws: Draws, num_samples: int, subset: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rises of the losses of the pool, mean over replicates [entry], and of a part of it [replicate, entry], nats.

    Args:
        run_calls: see ``runtime.pool.pool_tasks``.
        draws: where they are taken.
        num_samples: of the pool.
        subset: sample ids of the part.
    """
    parts, shards = np.array_split(subset, SUBSET_TASKS), pool_shards(num_samples)
    calls = [_call(draws, f"{draws.name}-subset-{n}", "pool", ids, False) for n, ids in enumerate(parts)]
    calls += [_call(draws, f"{draws.name}-pool-{n}", "pool", ids, True) for n, ids in enumerate(shards)]
    scores = [result["scores"] for result in run_calls(f"scoring the pool ({draws.name})", calls)]
    return np.concatenate(scores[len(parts) :], axis=1)[0], np.concatenate(scores[: len(parts)], axis=1)


def _call(draws: Draws, name: str, which: str, ids: np.ndarray, mean: bool) -> Call:
    what = [which, ids.tolist(), list(draws.chains), draws.num_pairs, mean]
    return Call(draws.subject, name, what, _rises, (draws, which, ids, mean))


def _rises(worker: Any, draws: Draws, which: str, ids: np.ndarray, mean: bool) -> Result:
    """Rises of the entries of pool or probe samples, ``scores`` [replicate, entry], or their mean [1, entry]."""
    subjects: Scored = worker.study
    target = subjects.target(draws.subject)

    def score(samples: Prepared) -> np.ndarray:
        rises = mean_rises(target, samples, draws.groups(subjects, target)).numpy()
        return rises.mean(axis=0, keepdims=True) if mean else rises

    return score_parts(subjects, target, draws.subject, which, ids, score)
