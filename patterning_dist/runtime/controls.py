"""Scores of a pool that no chain is run for: alignment of gradients at w*, and losses at another checkpoint.

    a_i = grad l_i(w*) . grad phi(w*)

over the coordinates of one component: a step of gradient descent on l_i, of rate eta, lowers phi by eta a_i to first
order (Pruthi et al., 2002.08484). It is a central difference of losses along grad phi, see ``sampling.direction``. With
an inverse it is n_beta times influence, what more weight on l_i lowers phi by at the optimum (Koh & Liang, 1703.04730):

    a_i = grad l_i(w*) . ( H + gamma / n_beta I )^-1 grad phi(w*) / n_beta
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from patterning_dist.aggregation.files import rank_part
from patterning_dist.runtime.pool import Call, RunCalls, Scored, pool_shards, score_parts
from patterning_dist.runtime.tasks import Result
from patterning_dist.sampling.direction import directional_losses, response_direction
from patterning_dist.sampling.layered import Prepared
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.statistics import flatten, unflatten
from patterning_dist.storage.snapshots import Snapshots, pack, unpack
from patterning_dist.storage.store import Storage

_STEP = 1e-3  # of the central difference, relative to the weights' norm
_TOLERANCE = 1e-3  # relative residual at which a solve stops


@dataclass(frozen=True)
class SplitGradient:
    """The gradient of a split loss at w*; goes to the workers, and every rank keeps its own part.

    Attributes:
        storage: of the run.
        subject: over whose component it is taken.
        name: of its files.
        split: of the held-out samples that the chains of the subject observe.
        inverse: steps of conjugate gradients at most, and samples of a Hessian product; None: the gradient as it is.
    """

    storage: Storage
    subject: str
    name: str
    split: str
    inverse: tuple[int, int] | None = None

    @property
    def kind(self) -> str:
        return "gradient" if self.inverse is None else "influence"

    def store(self, ranks: Ranks) -> Snapshots:
        """Where this rank keeps its part."""
        return Snapshots(
            self.storage,
            f"scores/{self.subject}/gradients",
            rank_part(0, ranks.rank, ranks.size) + f"-{self.kind}-{self.name}",
        )


def pool_alignments(
    run_calls: RunCalls, gradient: SplitGradient, num_samples: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """a_i of every loss of the pool [entry], in nats squared per squared unit of weight; how the solve ended.

    With an inverse they are nats squared.

    Args:
        run_calls: see ``runtime.pool.pool_tasks``.
        gradient: of the split loss.
        num_samples: of the pool.
    """
    subject, name = gradient.subject, f"{gradient.kind}-{gradient.name}"
    what = [gradient.split, *(gradient.inverse or ())]
    [solve] = run_calls(f"the gradient of {gradient.split}", [Call(subject, name, what, _solve, (gradient,))])
    calls = [
        Call(subject, f"{name}-{number}", [*what, ids.tolist()], _align, (gradient, ids))
        for number, ids in enumerate(pool_shards(num_samples))
    ]
    scores = [result["scores"] for result in run_calls(f"scoring the pool ({gradient.name})", calls)]
    return np.concatenate(scores, axis=1)[0], solve


def pool_losses(run_calls: RunCalls, subject: str, place: str, follows: Any, num_samples: int) -> np.ndarray:
    """Losses of the pool at the checkpoint of a subject [entry], nats.

    Args:
        run_calls: see ``runtime.pool.pool_tasks``.
        subject: whose inputs they follow from.
        place: name of the subject at whose checkpoint they are taken; maybe the same.
        follows: JSON of all that this checkpoint follows from.
        num_samples: of the pool.
    """
    calls = [
        Call(subject, f"losses-{place.replace('/', '-')}-{number}", [follows, ids.tolist()], _losses, (place, ids))
        for number, ids in enumerate(pool_shards(num_samples))
    ]
    scores = [result["scores"] for result in run_calls(f"losses of the pool at {place}", calls)]
    return np.concatenate(scores, axis=1)[0]


def _solve(worker: Any, gradient: SplitGradient) -> Result:
    """grad phi, or the inverse of it, kept by every rank; how conjugate gradients ended."""
    subjects: Scored = worker.study
    target, held_out = subjects.target(gradient.subject), subjects.split_loss(gradient.split)
    [found] = target.sum_gradients(target.prepare(held_out.samples), held_out.coefficients)
    report: dict[str, Any] = {"norm": target.dot(found, found) ** 0.5}
    if gradient.inverse is not None:
        iterations, num_samples = gradient.inverse
        samples = target.prepare(target.data, subjects.hessian_ids(num_samples))
        posterior = subjects.posterior(gradient.subject)
        solution = response_direction(
            target, posterior, found, samples, max_iterations=iterations, tolerance=_TOLERANCE
        )
        report, found = solution.ended, solution.vector
    gradient.store(subjects.ranks).write(1, pack({"gradient": flatten(found).numpy()}))
    return report


def _align(worker: Any, gradient: SplitGradient, ids: np.ndarray) -> Result:
    """a_i of the entries of pool samples, ``scores`` [1, entry]."""
    subjects: Scored = worker.study
    target = subjects.target(gradient.subject)
    stored = gradient.store(subjects.ranks).newest()
    assert stored is not None, f"the gradient of {gradient.split} is gone"
    along = unflatten(unpack(stored[1])["gradient"], target.center)
    step = _STEP * target.dot(target.center, target.center) ** 0.5

    def score(samples: Prepared) -> np.ndarray:
        return -directional_losses(target, samples, target.center, along, step=step).numpy()[None]

    return score_parts(subjects, target, gradient.subject, "pool", ids, score)


def _losses(worker: Any, place: str, ids: np.ndarray) -> Result:
    """Losses of the entries of pool samples, ``scores`` [1, entry]."""
    subjects: Scored = worker.study
    target = subjects.target(place)
    return score_parts(subjects, target, place, "pool", ids, lambda samples: target.losses(samples).numpy()[None])
