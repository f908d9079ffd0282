"""Short chains at many settings on Ray, a durable task each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import ray

from patterning_dist.config import SamplingConfig
from patterning_dist.progress import Progress
from patterning_dist.response.calibration import Setting, Trial
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.boards import Notes
from patterning_dist.runtime.chains.attempt import ChainStudy, MakeStudy
from patterning_dist.runtime.chains.groups import chain_workers
from patterning_dist.runtime.environment import ray_session
from patterning_dist.runtime.tasks import Result, Task, run_tasks
from patterning_dist.runtime.watch import Pulse, with_pulse
from patterning_dist.runtime.workforce import Workforce
from patterning_dist.sampling.chain import ChainFailure
from patterning_dist.sampling.lanczos import SpectrumEnds
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.temperature import Temperatures
from patterning_dist.storage.run import RunDirectory

# Seconds between two notes of a trial to the progress board.
# A measurement is timed that often: the first one may compile or allocate.
_TIMED_MEASUREMENTS = 3
# Hessian products: for both ends of the spectrum, and for the stiffest directions, which come first.
_CURVATURE_STEPS, TRIAL_LANCZOS_STEPS = 24, 10


@dataclass(frozen=True)
class TrialPlan:
    """What all trials have in common.

    Attributes:
        subject: the study's name of the set of chains that is calibrated.
        num_chains: of every setting.
        num_draws: of every trial, the first of them at the checkpoint itself.
        num_samples: samples of the probe; their mean losses are the last columns of ``Draw.losses``.
        takes_gradients: whether the full run takes gradients at every draw, which cost time as well.
    """

    subject: str
    num_chains: int
    num_draws: int
    num_samples: int
    takes_gradients: bool


class Trials:
    """The trials of a calibration, whose workers stay from one round of them to the next; a context manager.

    Args:
        make_study: opens the study in a worker.
        sampling: section of the experiment.
        device: of the workers.
        plan: what all trials have in common.
        run: holds the trials' files, in ``calibration/trials``.
        fingerprint: of all that a trial follows from besides its setting; a file with another one is run again.
        progress: shows the draws done, and the time left.
    """

    def __init__(
        self,
        make_study: MakeStudy,
        sampling: SamplingConfig,
        device: str,
        plan: TrialPlan,
        run: RunDirectory,
        fingerprint: str,
        progress: Progress,
    ) -> None:
        self.make_study, self.sampling, self.device, self.plan = make_study, sampling, device, plan
        self.run_directory, self.fingerprint, self.progress = run, fingerprint, progress
        self._resources, self._workers = contextlib.ExitStack(), cast(Workforce | None, None)

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def curvature(self) -> SpectrumEnds:
        """Ends of the spectrum of the Hessian of the loss at the checkpoint."""
        (found,) = self._run([("curvature", "curvature", (_curvature_on, self.plan))], "curvatures", 1)
        return SpectrumEnds(*found["ends"])

    def run(self, settings: Mapping[Setting, int]) -> dict[Setting, list[Trial]]:
        """One trial a chain of every setting -> steps between its draws, side by side; those with a file are done.

        A chain that failed is a trial like any other.
        """
        chains = [(setting, chain) for setting in settings for chain in range(self.plan.num_chains)]
        tasks = [
            (_key(s, chain), f"{_file_name(s, chain)}_{settings[s]}-steps", (_run_on, self.plan, s, chain, settings[s]))
            for s, chain in chains
        ]
        found: dict[Setting, list[Trial]] = {setting: [] for setting in settings}
        for (setting, _), result in zip(chains, self._run(tasks, "trials", self.plan.num_draws), strict=True):
            found[setting].append(Trial(**result))
        return found

    def _run(self, tasks: list[tuple[str, str, tuple[Any, ...]]], what: str, steps: int) -> Sequence[Result]:
        """Tasks: (key, name of the file, what a worker is to call with the number of workers and the board)."""
        durable = [
            Task(key, f"calibration/trials/{file}.npz", self.fingerprint, partial(self._start, key, call))
            for key, file, call in tasks
        ]
        return run_tasks(
            durable,
            self.run_directory,
            self._start_workers,
            self.progress,
            f"calibrating ({what})",
            what=what,
            timeout=self.sampling.progress_timeout,
            steps=steps,
        )

    def _start_workers(self, number: int) -> Workforce:
        if self._workers is None:
            number = max(number, self.plan.num_chains)
            self._resources.enter_context(ray_session(self.sampling.threads_per_worker))
            workers = chain_workers(self.make_study, self.sampling, self.device, number, self.progress)
            self._workers = self._resources.enter_context(workers)
        return self._workers

    def _start(self, key: str, call: tuple[Any, ...], worker: ActorHandle, pulse: Pulse) -> ray.ObjectRef:
        assert self._workers is not None
        arguments = (with_pulse, pulse, *call, self._workers.number, pulse.board)
        if self.sampling.ranks_per_chain > 1:
            return worker.everywhere.remote(f"in {key}", *arguments)
        return worker.__ray_call__.remote(*arguments)


def _curvature_on(worker: Any, plan: TrialPlan, num_workers: int, board: ActorHandle) -> Result:
    return {"ends": list(loss_curvature(worker.study, plan.subject))}


def loss_curvature(study: ChainStudy, subject: str) -> SpectrumEnds:
    """Ends of the spectrum of H, as the posterior's with n_beta = 1 and gamma = 0; every rank calls this."""
    chain = study.chain(subject, 0, posterior=Posterior(1.0, 0.0), lanczos_steps=_CURVATURE_STEPS, gradient="minibatch")
    assert chain.spectrum is not None
    return chain.spectrum


def _run_on(
    worker: Any, plan: TrialPlan, setting: Setting, chain: int, steps: int, num_workers: int, board: ActorHandle
) -> Result:
    note = Notes(board, _key(setting, chain), plan.num_draws)
    return vars(replace(run_trial(worker.study, plan, setting, chain, steps, note), num_workers=num_workers))


def run_trial(
    study: ChainStudy,
    plan: TrialPlan,
    setting: Setting,
    number: int,
    steps_between_draws: int,
    note: Callable[[int, float | None], object] = lambda done, loss: None,
) -> Trial:
    """Run one chain from the checkpoint, without burn-in, and time its steps and its measurements.

    On a chain group every rank calls this at once: what the ranks do together follows from the arguments alone.

    Args:
        study: held by this process.
        plan: what all trials have in common.
        setting: of this one.
        number: of the chain.
        steps_between_draws: sampler steps from one draw to the next.
        note: takes the number of draws done, and the loss.
    """
    chain = study.chain(
        plan.subject,
        number,
        posterior=Posterior(setting.inverse_temperature, setting.localization),
        step_size=setting.step_size,
        burn_in=0,
        num_draws=plan.num_draws,
        steps_between_draws=steps_between_draws,
        lanczos_steps=TRIAL_LANCZOS_STEPS,
    )
    measuring = min(_seconds(chain.target.measure) for _ in range(_TIMED_MEASUREMENTS))
    differentiating = _seconds(chain.target.split_gradients) if plan.takes_gradients else 0.0
    draws, failure, started = [], "", time.perf_counter()
    try:
        for draw in chain.draws():
            draws.append(draw)
            note(len(draws), draw.mean_loss)
    except ChainFailure as error:
        failure = str(error)
    walking = time.perf_counter() - started - len(draws) * measuring
    # Through, however few draws it made: a chain that diverged is a result like any other.
    note(plan.num_draws, None)
    heat = Temperatures([], [], []) if failure else chain.temperatures()
    samples = slice(-plan.num_samples, None)
    return Trial(
        mean_loss=np.array([draw.mean_loss for draw in draws]),
        observables=np.array([draw.observables for draw in draws]),
        losses=np.array([draw.losses[samples] for draw in draws], np.float32),
        num_coordinates=chain.num_coordinates,
        step_seconds=max(walking, 0.0) / max(chain.state.step, 1),
        draw_seconds=measuring + differentiating,
        temperatures=np.array(heat.temperatures),
        step_biases=np.array(heat.step_biases),
        stiff_temperatures=np.array(heat.stiff_temperatures),
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
    return f"eps-{step_size:.6g}_n-beta-{inverse_temperature:.6g}_gamma-{localization:.6g}_chain-{chain}"
