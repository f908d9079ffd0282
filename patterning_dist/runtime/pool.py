"""Scores of every loss of a training pool, in parallel: durable tasks over its samples, under scores/."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from patterning_dist.config import SamplingConfig
from patterning_dist.progress import Progress
from patterning_dist.response.columns import StoredShard
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.chains.attempt import MakeStudy
from patterning_dist.runtime.chains.groups import chain_workers
from patterning_dist.runtime.environment import ray_session
from patterning_dist.runtime.tasks import Result, Task, digest, run_tasks
from patterning_dist.runtime.watch import Pulse, with_pulse
from patterning_dist.runtime.workforce import Workforce
from patterning_dist.sampling.layered import Prepared
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samples import Part, Samples
from patterning_dist.sampling.target import Target
from patterning_dist.storage.files import write_npy
from patterning_dist.storage.run import RunDirectory
from patterning_dist.tasks.held_out import HeldOut

SHARD_SAMPLES = 256  # pool samples a task: seconds of work, so that the last tasks do not leave workers idle
SUBSET_TASKS = 4
PREPARED = 256  # samples of which what does not move is held at once
_STORED = 1 << 22  # numbers of a file of scores, 16 MB


class Scored(Protocol):
    """What a worker needs of the subjects of an experiment."""

    ranks: Ranks
    seed: int

    def target(self, name: str) -> Target: ...
    def posterior(self, name: str) -> Posterior: ...
    def source(self, name: str, which: str) -> Samples: ...
    def split_loss(self, split: str) -> HeldOut: ...
    def hessian_ids(self, num_samples: int) -> np.ndarray: ...
    def entries_of(self, which: str, ids: np.ndarray, losses: np.ndarray) -> np.ndarray: ...


class Call(NamedTuple):
    """A task: ``function(worker, *arguments)`` on a worker, on every rank of a chain group.

    ``what`` is JSON of all that its result follows from besides the inputs of its subject. ``file`` keeps the result;
    None: scores/<subject>/<name>.npz.
    """

    subject: str
    name: str
    what: Any
    function: Callable[..., Result]
    arguments: tuple[Any, ...]
    file: str | None = None


RunCalls = Callable[[str, Sequence[Call]], Sequence[Result]]


@contextlib.contextmanager
def pool_tasks(
    opener: MakeStudy,
    sampling: SamplingConfig,
    device: str,
    run: RunDirectory,
    inputs: Callable[[str], Any],
    num_shards: int,
    progress: Progress,
) -> Iterator[RunCalls]:
    """A function (label, calls) -> results that runs calls on chain workers and keeps what an earlier driver got done.

    Args:
        opener: opens the subjects in a worker.
        sampling: section of the experiment.
        device: of the workers.
        run: holds the results.
        inputs: subject -> JSON of hashes of all that its chains follow from, and so data, checkpoint, posterior.
        num_shards: calls that may run side by side.
        progress: shows the calls done.
    """
    grouped = sampling.ranks_per_chain > 1
    with contextlib.ExitStack() as resources:

        @cache  # Ray starts when the first task that is not done needs it
        def workers() -> Workforce:
            resources.enter_context(ray_session(sampling.threads_per_worker))
            return resources.enter_context(chain_workers(opener, sampling, device, num_shards, progress))

        def task(call: Call) -> Task:
            def start(worker: ActorHandle, pulse: Pulse) -> Any:
                if grouped:
                    return worker.everywhere.remote(
                        f"in {call.name}", with_pulse, pulse, call.function, *call.arguments
                    )
                return worker.__ray_call__.remote(with_pulse, pulse, call.function, *call.arguments)

            follows = [inputs(call.subject), device, sampling.ranks_per_chain, call.what]
            file = call.file or f"scores/{call.subject}/{call.name}.npz"
            return Task(f"{call.subject}/{call.name}", file, digest({}, {"inputs": follows}), start)

        def run_calls(label: str, calls: Sequence[Call]) -> Sequence[Result]:
            tasks = [task(call) for call in calls]
            what, timeout = f"tasks of {label}", sampling.progress_timeout
            return run_tasks(tasks, run, lambda number: workers(), progress, label, what=what, timeout=timeout)

        yield run_calls


def pool_shards(num_samples: int) -> list[np.ndarray]:
    """Ids of the samples of a pool, a task each."""
    ids = np.arange(num_samples)
    return [ids[start : start + SHARD_SAMPLES] for start in range(0, num_samples, SHARD_SAMPLES)]


def store_columns(parts: Iterable[np.ndarray], folder: Path) -> list[StoredShard]:
    """Scores [row, entry] of consecutive parts of a pool in files of a folder, less the mean of every row over all.

    The folder is emptied first; no more than a file's part of the pool is in memory.
    """
    shutil.rmtree(folder, ignore_errors=True)
    files, waiting, sums, count = list[Path](), list[np.ndarray](), np.zeros(0), 0
    for part, is_last in _with_last(parts):
        waiting.append(part)
        sums = part.sum(axis=1, dtype=np.float64) + (sums if len(sums) else 0.0)
        count += part.shape[1]
        if is_last or sum(each.size for each in waiting) >= _STORED:
            files.append(folder / f"{len(files):06d}.npy")
            stored = np.concatenate(waiting, axis=1)
            write_npy(files[-1], stored.shape, [stored])
            waiting.clear()
    return [StoredShard(file, sums / count) for file in files]


def _with_last(parts: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, bool]]:
    parts = iter(parts)
    before = next(parts)
    for part in parts:
        yield before, False
        before = part
    yield before, True


def score_parts(
    subjects: Scored, target: Target, subject: str, which: str, ids: np.ndarray, score: Callable[[Prepared], np.ndarray]
) -> Result:
    """``scores`` float32 [row, entry] of pool or probe samples, a part of them prepared at a time.

    Args:
        subjects: of the worker.
        target: of the subject, which ``score`` places where it takes the scores.
        subject: name of it.
        which: ``pool`` or ``probe``.
        ids: samples of it.
        score: prepared samples -> [row, sample(, position)].
    """
    parts = []
    for start in range(0, len(ids), PREPARED):
        here = ids[start : start + PREPARED]
        samples = target.prepare(Part(subjects.source(subject, which), here))
        parts.append(subjects.entries_of(which, here, score(samples).astype(np.float32)))
    return {"scores": np.concatenate(parts, axis=1)}
