"""What trainings take: stages train and retrain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from patterning_dist.config import Config
from patterning_dist.config.checkpoints import INITIALISATION
from patterning_dist.progress import Progress
from patterning_dist.response.cost import NOTHING, Seconds
from patterning_dist.runtime.probe.training import JobTimes, StepTimes, probe_job, probe_steps
from patterning_dist.runtime.training.jobs import run_jobs
from patterning_dist.stages.plan.table import StagePlan
from patterning_dist.stages.rounds import Round, later_rounds, rounds_of
from patterning_dist.stages.train import baseline_job
from patterning_dist.storage.run import RunDirectory
from patterning_dist.training.job import JobGroup, TrainingJob


@dataclass(frozen=True)
class Trainings:
    """What one step, one row of metrics and one job take."""

    config: Config
    steps: StepTimes
    job: JobTimes

    def plan_train(self) -> StagePlan:
        """Stage train: its workers, all steps, all rows of metrics."""
        settings, job = self.config.training, self.job
        assert settings is not None
        total = settings.num_steps + settings.anneal_steps
        rows = len({*range(settings.evaluate_every, total + 1, settings.evaluate_every), settings.num_steps, total})
        steps = job.step * settings.num_steps + job.anneal_step * settings.anneal_steps
        return self._plan(
            "train",
            f"{settings.num_steps:,} steps, {settings.anneal_steps:,} of annealing",
            job.starting + job.opening + steps + self.steps.evaluation * rows + job.closing + job.stopping,
            processes=settings.num_workers,
            disk_bytes=3 * self.steps.weight_bytes,  # initial, before the annealing, and annealed
            num_steps=total,
        )

    def plan_retrain(self) -> StagePlan:
        """Stage retrain without the chains of rounds: jobs one after another in every queue, round by round."""
        settings, number, later = self.config.retrain, num_retrainings(self.config), later_rounds(self.config)
        assert settings is not None
        most = max(arm.rounds for arm in settings.arm_list)
        seconds = NOTHING
        for n in range(1, most + 1):
            seconds += self.job.starting + self._queues(rounds_of(self.config, n)) + self.job.stopping
            if n > 1 and self.config.solve is not None and self.config.solve.scores == "first_moment":
                seconds += self._annealing(len(rounds_of(self.config, n)))
        again = f", in {number + len(later)} rounds" if later else ""
        stacked = ", the seeds of an arm in a stack" if settings.engine == "stacked" else ""
        per_network = 2 * self.steps.weight_bytes // len(_stack(self.config))  # initial and final weights
        joined = sum(part.number == part.arm.rounds for part in later)
        return self._plan(
            "retrain",
            f"{number} trainings of {settings.num_steps:,} steps{again}{stacked}, {self.steps.num_queues} at once",
            seconds,
            processes=self.steps.num_queues * settings.num_workers,
            disk_bytes=(number + len(later) + joined) * per_network,
            num_steps=number * settings.num_steps,
        )

    def _annealing(self, number: int) -> Seconds:
        """Wall time of the copies that first moments are read off between two rounds."""
        assert self.config.training is not None
        each = self.job.opening + self.job.anneal_step * self.config.training.anneal_steps + self.job.closing
        return self.job.starting + each * math.ceil(number / self.steps.num_queues) + self.job.stopping

    def _queues(self, rounds: Sequence[Round]) -> Seconds:
        """Wall time of trainings: of the queue that takes longest, each of which takes every so many-th."""
        settings, job, queues = self.config.retrain, self.job, self.steps.num_queues
        assert settings is not None
        found = []
        stacked = settings.engine == "stacked"
        for part in {part.arm.name: part for part in rounds}.values() if stacked else rounds:
            num_steps = part.num_steps(settings.num_steps)
            rows = math.ceil(num_steps / settings.evaluate_every)
            found.append(job.opening + self.steps.step * num_steps + self.steps.evaluation * rows + job.closing)
        return max((sum(found[n::queues], NOTHING) for n in range(queues)), key=lambda seconds: seconds.value)

    def _plan(self, stage: str, what: str, seconds: Seconds, *, num_steps: int, **sizes: Any) -> StagePlan:
        assert self.config.training is not None
        return StagePlan(
            stage,
            what,
            seconds,
            cores=self.config.training.threads_per_worker,
            on_device=True,
            process_bytes=self.steps.process_bytes,
            details={
                "num_steps": num_steps,
                "weight_bytes": self.steps.weight_bytes,
                "gradient_bytes": self.steps.weight_bytes,
                "optimizer_bytes": self.steps.optimizer_bytes,
                "activation_bytes": self.steps.activation_bytes,
            },
            **sizes,
        )


def num_retrainings(config: Config) -> int:
    """Arms, each with its seeds."""
    assert config.retrain is not None
    return sum(len(arm.seeds) for arm in config.retrain.arm_list)


@dataclass(frozen=True)
class Trial:
    """Jobs that stand for many: those that are trained at once, how many such there are, and how many side by side."""

    jobs: list[TrainingJob]
    number: int
    concurrent: int | None = None


def baseline_trial(config: Config, directory: Path) -> Trial:
    """The baseline."""
    return Trial([baseline_job(config, directory)], 1)


def retrain_trial(config: Config, directory: Path) -> Trial:
    """The retrainings, stacks of them where they are stacked."""
    assert config.retrain is not None
    jobs = [_retraining(config, directory, seed) for seed in _stack(config)]
    number = len(config.retrain.arms) if jobs[0].stack else num_retrainings(config)
    return Trial(jobs, number, config.retrain.concurrent_arms)


def probe_trainings(config: Config, workspace: RunDirectory, device: str, trial: Trial) -> Trainings:
    """Time steps and one short training."""
    steps = probe_steps(config, workspace.path, JobGroup(tuple(trial.jobs)), device, trial.number, trial.concurrent)

    def train(short: Config) -> None:
        settings = short.training
        assert settings is not None
        lengths = {key: getattr(settings, key) for key in ("num_steps", "anneal_steps", "evaluate_every")}
        jobs = [replace(job, **lengths) for job in trial.jobs]
        run_jobs(short, workspace, jobs, "probe", Progress(Console(quiet=True)), 1)

    # Ranks that share a batch take about as long a step as one that has it to itself.
    return Trainings(config, steps, probe_job(config, trial.jobs[-1].folder, train, steps.step, steps.evaluation))


def _stack(config: Config) -> list[int]:
    """Seeds that one training is of: all of an arm where they are stacked."""
    assert config.retrain is not None
    seeds = config.retrain.arm_list[0].seeds
    return seeds if config.retrain.engine == "stacked" else seeds[:1]


def _retraining(config: Config, directory: Path, seed: int) -> TrainingJob:
    """An arm without weights."""
    settings = config.retrain
    assert settings is not None
    arm = settings.arm_list[0]
    return TrainingJob(
        name="probe",
        folder=directory / "retrain" / f"probe-{seed}",
        inputs=None,
        seed=seed,
        num_steps=settings.num_steps,
        evaluate_every=settings.evaluate_every,
        start=None if arm.start == INITIALISATION else arm.start,
        splits=tuple((o.name, o.split) for o in config.sampling.observables if o.kind == "split_loss"),
        deepspeed=settings.deepspeed,
        num_workers=settings.num_workers,
        stack="probe" if settings.engine == "stacked" else None,
    )
