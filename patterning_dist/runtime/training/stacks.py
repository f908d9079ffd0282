"""Stacks of small networks trained on Ray, a durable task each."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial

import ray

from patterning_dist.config import SamplingConfig
from patterning_dist.progress import Progress
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.environment import ray_session
from patterning_dist.runtime.model_workers import study_workers
from patterning_dist.runtime.tasks import Task, run_tasks
from patterning_dist.runtime.training.stack_worker import StackRecipe, StackTask, Trained, open_stacks, train_stack
from patterning_dist.runtime.watch import Pulse, with_pulse
from patterning_dist.runtime.workforce import Workforce
from patterning_dist.storage.run import RunDirectory


def train_stacks(
    recipe: StackRecipe,
    sampling: SamplingConfig,
    device: str,
    run: RunDirectory,
    inputs: str,
    stacks: Sequence[StackTask],
    folder: str,
    progress: Progress,
) -> list[Trained]:
    """Train the stacks of which there is no file yet, side by side.

    Args:
        recipe: what the stacks have in common.
        sampling: section of the experiment: its workers train.
        device: of the workers.
        run: the task's files are read there, and those of the stacks written.
        inputs: hash of the task and of the settings of a training.
        stacks: in the order in which they are begun.
        folder: of the files <arm>-<first seed>.npz, relative to the run directory.
        progress: shows the steps done, and the time left.

    Returns:
        All stacks, in their order.

    Raises:
        PatterningError: a network's parameters are not finite, or the cluster has no room.
    """
    with contextlib.ExitStack() as resources:

        def start_workers(number: int) -> Workforce:
            resources.enter_context(ray_session(sampling.threads_per_worker))
            opener = partial(open_stacks, recipe, run.location)
            return resources.enter_context(study_workers(opener, sampling, device, number, progress))

        def train(stack: StackTask, worker: ActorHandle, pulse: Pulse) -> ray.ObjectRef:
            return worker.__ray_call__.remote(with_pulse, pulse, train_stack, recipe, stack, pulse.board)

        tasks = [
            Task(
                stack.key,
                f"{folder}/{stack.arm}-{stack.seeds[0]}.npz",
                stack.fingerprint(inputs),
                partial(train, stack),
            )
            for stack in stacks
        ]
        found = run_tasks(
            tasks,
            run,
            start_workers,
            progress,
            "training networks (steps)",
            what="stacks of networks",
            timeout=sampling.progress_timeout,
            steps=recipe.settings.num_steps,
        )
    return [Trained.of(result) for result in found]
