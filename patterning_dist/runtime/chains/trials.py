"""Short chains at many settings on Ray, a durable task each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import ray

from patterning_dist.config import SamplingConfig
from patterning_dist.progress import Progress
from patterning_dist.response.calibration import Setting, Trial
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.chains.attempt import ChainStudy
from patterning_dist.runtime.chains.groups import chain_workers
from patterning_dist.runtime.chains.workers import MakeStudy, Result
from patterning_dist.runtime.environment import ray_session
from patterning_dist.runtime.tasks import Task, run_tasks
from patterning_dist.runtime.workforce import Workforce
from patterning_dist.sampling.chain import ChainFailure
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.storage.run import RunDirectory

# Seconds between two notes of a trial to the progress board.
_NOTE_EVERY = 0.5
# A measurement is timed that often: the first one may compile or allocate.
_TIMED_MEASUREMENTS = 3


@dataclass(frozen=True)
class TrialPlan:
    """What all trials have in common.

    Attributes:
        unit: the study's name of the set of chains that is calibrated.
        num_draws: of every trial, the first of them at the checkpoint itself.
        steps_between_draws: sampler steps from one draw to the next.
        num_samples: samples of the probe; their mean losses are the last columns of ``Draw.losses``.
        takes_gradients: whether the full run takes gradients at every draw, which cost time as well.
    """

    unit: str
    num_draws: int
    steps_between_draws: int
    num_samples: int
    takes_gradients: bool


def run_trials(
    make_study: MakeStudy,
    sampling: SamplingConfig,
    device: str,
    plan: TrialPlan,
    trials: list[tuple[Setting, int]],
    run: RunDirectory,
    folder: str,
    fingerprint: str,
    progress: Progress,
) -> list[Trial]:
    """Run the trials of which there is no file yet, side by side.

    Args:
        make_study: opens the study in a worker.
        sampling: section of the experiment.
        device: of the workers.
        plan: what all trials have in common.
        trials: (setting, chain), in the order in which they are begun.
        run: holds the trials' files.
        folder: of them, relative to the run directory.
        fingerprint: of all else that a trial follows from; a file with another one is run again.
        progress: shows the draws done, and the time left.

    Returns:
        Every trial, in their order; a chain that failed is one of them.
    """
    grouped = sampling.ranks_per_chain > 1
    with contextlib.ExitStack() as resources:

        def hire(number: int) -> Workforce:
            nonlocal num_workers
            resources.enter_context(ray_session(sampling.threads_per_worker))
            workers = resources.enter_context(chain_workers(make_study, sampling, device, number, progress))
            num_workers = workers.number
            return workers

        def start(setting: Setting, chain: int, worker: ActorHandle, board: ActorHandle) -> ray.ObjectRef:
            arguments = (_run_on, plan, setting, chain, num_workers, board)
            if grouped:
                return worker.everywhere.remote(f"in {_key(setting, chain)}", *arguments)
            return worker.__ray_call__.remote(*arguments)

        num_workers = 0
        tasks = [
            Task(_key(*trial), f"{folder}/{_file_name(*trial)}", fingerprint, partial(start, *trial))
            for trial in trials
        ]
        label = "calibrating (draws)"
        found = run_tasks(tasks, run, hire, progress, label, what="trials", units=plan.num_draws)
    return [Trial(**result) for result in found]


def _run_on(worker: Any, plan: TrialPlan, setting: Setting, chain: int, num_workers: int, board: ActorHandle) -> Result:
    return vars(replace(run_trial(worker.study, plan, setting, chain, board), num_workers=num_workers))


def run_trial(study: ChainStudy, plan: TrialPlan, setting: Setting, number: int, board: ActorHandle) -> Trial:
    """Run one chain from the checkpoint, without burn-in, and time its steps and its measurements.

    On a chain group every rank calls this at once: what the ranks do together follows from the arguments alone.

    Args:
        study: held by this process.
        plan: what all trials have in common.
        setting: of this one.
        number: of the chain.
        board: actor that takes notes of progress.
    """
    chain = study.chain(
        plan.unit,
        number,
        posterior=Posterior(setting.inverse_temperature, setting.localization),
        step_size=setting.step_size,
        burn_in=0,
        num_draws=plan.num_draws,
        steps_between_draws=plan.steps_between_draws,
    )
    measuring = min(_seconds(chain.target.measure) for _ in range(_TIMED_MEASUREMENTS))
    differentiating = _seconds(chain.target.split_gradients) if plan.takes_gradients else 0.0
    key, total, noted = _key(setting, number), plan.num_draws, 0.0
    draws, failure, started = [], "", time.perf_counter()
    try:
        for draw in chain.draws():
            draws.append(draw)
            if time.monotonic() - noted > _NOTE_EVERY:
                board.note.remote(key, done=len(draws), total=total, loss=draw.mean_loss, healthy=True)
                noted = time.monotonic()
    except ChainFailure as error:
        failure = str(error)
    walking = time.perf_counter() - started - len(draws) * measuring
    # Through, however few draws it made: a chain that diverged is a result like any other.
    board.note.remote(key, done=total, total=total, loss=None, healthy=True)
    samples = slice(-plan.num_samples, None)
    return Trial(
        mean_loss=np.array([draw.mean_loss for draw in draws]),
        observables=np.array([draw.observables for draw in draws]),
        losses=np.array([draw.losses[samples] for draw in draws], np.float32),
        num_coordinates=chain.num_coordinates,
        step_seconds=max(walking, 0.0) / max(chain.state.step, 1),
        draw_seconds=measuring + differentiating,
        failure=failure,
    )


def _key(setting: Setting, chain: int) -> str:
    return f"{setting.words}, chain {chain}"


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _file_name(setting: Setting, chain: int) -> str:
    step_size, inverse_temperature, localization = setting
    return f"eps-{step_size:.6g}_n-beta-{inverse_temperature:.6g}_gamma-{localization:.6g}_chain-{chain}.npz"
