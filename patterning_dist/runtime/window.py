"""Windows walked on workers, a task a subject."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from patterning_dist.config import SamplingConfig
from patterning_dist.progress import Progress
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.chains.groups import chain_workers
from patterning_dist.runtime.chains.workers import MakeStudy, Result
from patterning_dist.runtime.environment import ray_session
from patterning_dist.runtime.tasks import Task, digest, run_tasks
from patterning_dist.runtime.workforce import Workforce
from patterning_dist.storage.run import RunDirectory
from patterning_dist.training.walk import Window, walk


def walk_windows(
    opener: MakeStudy,
    sampling: SamplingConfig,
    device: str,
    run: RunDirectory,
    window: Window,
    inputs: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Result]:
    """Walk the windows of subjects, see ``training.walk``.

    Args:
        opener: opens the subjects in a worker; the component of each is all that its training moves.
        sampling: section of the experiment.
        device: of the workers.
        run: holds the results: what an earlier driver got done is kept.
        window: that is walked.
        inputs: subject -> JSON of hashes of all that its result follows from besides.
        progress: shows the subjects done.

    Returns:
        Subject -> what ``walk`` returns of it.
    """
    grouped = sampling.ranks_per_chain > 1
    settings = [
        window.training.model_dump(mode="json"),
        window.num_steps,
        window.tau,
        window.clipping,
        window.settings.model_dump(mode="json"),
        device,
    ]
    with contextlib.ExitStack() as resources:

        @cache  # Ray starts when the first task that is not done needs it
        def workers(number: int) -> Workforce:
            resources.enter_context(ray_session(sampling.threads_per_worker))
            return resources.enter_context(chain_workers(opener, sampling, device, number, progress))

        def task(name: str) -> Task:
            def start(worker: ActorHandle, board: ActorHandle) -> Any:
                if grouped:
                    return worker.everywhere.remote(f"in {name}", _walk, name, window)
                return worker.__ray_call__.remote(_walk, name, window)

            return Task(name, f"{name}.npz", digest({}, {"inputs": inputs[name], "settings": settings}), start)

        tasks = [task(name) for name in inputs]
        found = run_tasks(tasks, run, workers, progress, "walking the windows", what="windows")
    return dict(zip(inputs, found, strict=True))


def _walk(worker: Any, name: str, window: Window) -> Result:
    return walk(worker.study, name, window)
