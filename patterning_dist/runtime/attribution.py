"""Attribution scores of every training sample for queries, and the queries' losses at retrained checkpoints.

Queries are the held-out samples of the opened subjects. Scores are signed as losses: below 0 for what helps a query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from patterning_dist.aggregation.files import read_positions
from patterning_dist.config.response import DirectionConfig
from patterning_dist.config.sampling import SamplingConfig
from patterning_dist.runtime.pool import Call, RunCalls, Scored, pool_shards
from patterning_dist.runtime.tasks import Result
from patterning_dist.sampling.direction import directional_losses, response_direction
from patterning_dist.sampling.samples import Part, all_losses
from patterning_dist.sampling.statistics import unflatten
from patterning_dist.storage.mirror import Location
from patterning_dist.tasks.held_out import HeldOut
from patterning_dist.tasks.task import Task
from patterning_dist.training.job import checkpoint_files

FOLDER = "validate/passes"
MODELS_A_TASK = 8


class Attributed(Scored, Protocol):
    """What a worker needs of the subjects of an experiment."""

    task: Task
    sampling: SamplingConfig

    @property
    def held_out(self) -> HeldOut | None: ...


@dataclass(frozen=True)
class Passes:
    """What scores are taken of; goes to the workers.

    Attributes:
        location: of the run.
        subject: checkpoint and component.
        chains: numbers of the healthy ones, of susceptibilities.
        settings: of the inverse, of the influence.
        tokens: scores of every loss of a sample, instead of their sum.
    """

    location: Location
    subject: str
    chains: tuple[int, ...]
    settings: DirectionConfig
    tokens: bool

    def call(self, name: str, what: Any, function: Any, *arguments: Any) -> Call:
        """A durable task of these passes."""
        return Call(self.subject, name, [what, self.tokens], function, (self, *arguments), f"{FOLDER}/{name}.npz")


def direction_scores(run_calls: RunCalls, passes: Passes, method: str, num_queries: int) -> np.ndarray:
    """-grad l_i(w*) . c_q with c_q = grad l_q(w*), or (n_beta H + gamma I)^-1 of it: gradients, or influence.

    Returns:
        float32 [query, sample(, position)], nats squared.
    """
    settings = passes.settings.model_dump(mode="json", exclude={"component"})
    calls = [
        passes.call(f"{method}-{query}", [method, query, settings], _along, method, query)
        for query in range(num_queries)
    ]
    return np.stack([result["scores"] for result in run_calls(f"scores by {method}", calls)])


def covariance_scores(run_calls: RunCalls, passes: Passes, num_samples: int) -> np.ndarray:
    """chi_iq = -Cov(l_i, l_q) over the kept draws of a chain, mean over chains, float32 [query, sample(, position)]."""
    what = ["susceptibility", list(passes.chains)]
    calls = [
        passes.call(f"susceptibility-{number}", [*what, ids.tolist()], _covariances, ids)
        for number, ids in enumerate(pool_shards(num_samples))
    ]
    parts = [result["scores"] for result in run_calls("scores by susceptibility", calls)]
    return np.concatenate(parts, axis=1)


def retrained_losses(run_calls: RunCalls, passes: Passes, models: Mapping[str, str]) -> np.ndarray:
    """Mean loss of every query at checkpoints [checkpoint, query], nats; every loss is kept beside, under ``losses``.

    Args:
        run_calls: see ``runtime.pool.pool_tasks``.
        passes: any of the queries.
        models: names of the checkpoints, and hashes of what each follows from.
    """
    names = list(models)
    parts = [names[start : start + MODELS_A_TASK] for start in range(0, len(names), MODELS_A_TASK)]
    calls = [
        passes.call(f"retrained-{number}", [[name, models[name]] for name in part], _losses_at, part)
        for number, part in enumerate(parts)
    ]
    return np.concatenate([result["means"] for result in run_calls("losses of the queries", calls)])


def query_means(held_out: HeldOut, losses: torch.Tensor) -> torch.Tensor:
    """Mean loss of every query [query], float64, over the entries that count.

    Args:
        held_out: queries, with the split overall as its first row.
        losses: [query] or [query, position].
    """
    counts = (held_out.coefficients[0] > 0).double()
    return (counts * losses).reshape(len(losses), -1).sum(dim=1) / counts.reshape(len(losses), -1).sum(dim=1)


def _along(worker: Any, passes: Passes, method: str, query: int) -> Result:
    """``scores`` of the whole pool for one query, along its gradient or what the inverse makes of it."""
    subjects: Attributed = worker.study
    target, held_out = subjects.target(passes.subject), subjects.held_out
    assert held_out is not None
    counted = float((held_out.coefficients[0, query] > 0).sum())
    direction = target.mean_gradient(target.prepare(Part(held_out.samples, np.array([query]))), counted)[1]
    if method == "influence":
        direction = response_direction(
            target,
            subjects.posterior(passes.subject),
            direction,
            target.prepare(target.data, subjects.hessian_ids(passes.settings.hessian_sequences)),
            max_iterations=passes.settings.conjugate_gradient_iterations,
            tolerance=passes.settings.tolerance,
        ).vector
    step = passes.settings.step * target.dot(target.center, target.center) ** 0.5
    pool, parts = subjects.source(passes.subject, "pool"), []
    for ids in pool_shards(len(pool)):
        samples = target.prepare(Part(pool, ids))
        found = directional_losses(target, samples, target.center, direction, step=step)
        parts.append(_of_samples(found, passes.tokens))
    return {"scores": torch.cat(parts).float().numpy()}


def _covariances(worker: Any, passes: Passes, ids: np.ndarray) -> Result:
    """``scores`` of some samples of the pool for all queries."""
    subjects: Attributed = worker.study
    target, ranks = subjects.target(passes.subject), subjects.ranks
    assert subjects.held_out is not None and target.held_out is not None
    samples = target.prepare(Part(subjects.source(passes.subject, "pool"), ids))
    storage = passes.location.storage
    total = None
    for of_chain in read_positions(storage, passes.subject, passes.chains, ranks.rank, ranks.size):
        queries, losses = [], []
        for position in of_chain:
            target.move_to(unflatten(position, target.center))
            queries.append(query_means(subjects.held_out, target.losses(target.held_out)))
            losses.append(_of_samples(target.losses(samples), passes.tokens))
        q, own = (torch.stack(series) for series in (queries, losses))
        found = torch.tensordot(q - q.mean(dim=0), own - own.mean(dim=0), dims=([0], [0])) / (len(q) - 1)
        total = found if total is None else total + found
    target.move_to(target.center)
    assert total is not None  # there are enough healthy chains
    return {"scores": (-total / len(passes.chains)).float().numpy()}


def _losses_at(worker: Any, passes: Passes, names: Sequence[str]) -> Result:
    """``losses`` [checkpoint, query(, position)] and ``means`` [checkpoint, query] of the queries."""
    subjects: Attributed = worker.study
    held_out, task, size = subjects.held_out, subjects.task, subjects.sampling.micro_batch_size
    assert held_out is not None
    found = []
    for name in names:
        passes.location.fetch(*checkpoint_files(name))
        losses = partial(task.losses, task.load(name, subjects.ranks))
        found.append(all_losses(losses, held_out.samples, subjects.ranks, size, worker.device))
    means = torch.stack([query_means(held_out, losses) for losses in found])
    return {"losses": torch.stack(found).float().numpy(), "means": means.numpy()}


def _of_samples(losses: torch.Tensor, tokens: bool) -> torch.Tensor:
    """Sums over the losses of a sample, or all of them."""
    return losses if tokens or losses.dim() == 1 else losses.sum(dim=1)
