"""`patterning plan`: what every stage of an experiment takes, from a short probe of its real pieces or by arithmetic.

Nothing is written into the run directory: the probe works in a temporary folder.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from safetensors.torch import save_model

from patterning_dist.config import BASELINE, Config, TextConfig
from patterning_dist.progress import Progress
from patterning_dist.response.cost import Seconds
from patterning_dist.runtime.environment import ray_session
from patterning_dist.stages.plan.analytic import Analytic
from patterning_dist.stages.plan.machine import Machine
from patterning_dist.stages.plan.measured import Measured
from patterning_dist.stages.plan.predict import plan_predict
from patterning_dist.stages.plan.solve import plan_rounds, plan_solve
from patterning_dist.stages.plan.table import Plan, StagePlan
from patterning_dist.stages.plan.training import baseline_trial, retrain_trial
from patterning_dist.stages.plan.validate import plan_validate, validate_trial
from patterning_dist.stages.prepare import prepare
from patterning_dist.stages.rounds import later_rounds
from patterning_dist.stages.sample import solved_subjects
from patterning_dist.storage.run import RunDirectory
from patterning_dist.tasks.open import open_task

_ON_CHAINS, _ON_TRAININGS = {"sample", "solve", "check", "predict", "validate"}, {"train", "retrain"}
_PAGE, _PAGE_BYTES = Seconds(1.5, 1.0, 3.0), 2_000_000  # of the report


def plan_run(
    config: Config,
    stages: list[str],
    directory: Path,
    done: list[str],
    say: Callable[[str], None],
    machine: Machine | None = None,
) -> Plan:
    """Plan the stages of an experiment.

    Args:
        config: of the run.
        stages: that the experiment asks for, in their order; one that is not of the loop is named and not measured.
        directory: of the run, read only, and only if some of its stages are done.
        done: stages that are finished with this configuration.
        say: hears what is being measured.
        machine: that is planned for, by arithmetic; None: this one, by a probe of the real pieces.

    Raises:
        PatterningError: whatever the run itself would refuse.
    """
    started = time.monotonic()
    pending = {stage for stage in stages if stage not in done}
    probed = pending | ({"solve"} if "retrain" in pending and later_rounds(config) else set())
    found = {stage: StagePlan(stage, "", is_done=True) for stage in done}
    with contextlib.ExitStack() as resources:
        workspace = resources.enter_context(_workspace(directory, done))
        if "prepare" in pending:
            say("plan: reading the corpus and training the tokenizer")
            found["prepare"] = _prepare(config, workspace)
        prober: Measured | Analytic
        if machine is None:
            prober = Measured(config, workspace)
            if "train" in pending:
                _fresh_baseline(config, workspace.path)
            if probed & (_ON_CHAINS | _ON_TRAININGS):
                say("plan: starting Ray")
                seconds = _timed(lambda: resources.enter_context(ray_session(config.sampling.threads_per_worker)))
                found = {"start": StagePlan("start", "Ray, once for all stages", Seconds.about(seconds, 0.3))} | found
                prober.on_cluster = True
        else:
            say("plan: counting passes of the model, without its weights")
            prober = Analytic(config, workspace, machine, directory, pending)
            config = prober.config
        if not prober.has_times:
            return prober.plan(stages, found, 0, time.monotonic() - started)
        found |= {stage: StagePlan(stage, "does not fit") for stage in pending & prober.unfit}
        pending, probed = pending - prober.unfit, probed - prober.unfit
        if pending & _ON_TRAININGS:
            say("plan: timing optimizer steps, and a training of a few")
            found |= _plan_trainings(config, prober, workspace.path, pending)
        statistics = 0
        if probed & _ON_CHAINS:
            say("plan: timing chains, measurements and scores")
            chains = prober.chains(probed)
            statistics = chains.statistics_bytes()
            solved = solved_subjects(config, chains.subjects.by_name) if config.solve else []
            found |= {"sample": chains.plan_sample()} if "sample" in pending else {}
            found |= {"solve": plan_solve(chains, solved, workspace.path)} if "solve" in pending else {}
            found |= {"check": chains.plan_check(solved[0])} if "check" in pending else {}
            found |= {"predict": plan_predict(chains)} if "predict" in pending else {}
            if "retrain" in pending and (again := plan_rounds(chains, solved, workspace.path)):
                found["retrain"] = _together(found["retrain"], again)
            if "validate" in pending:
                say("plan: timing the retrainings of stage validate")
                trial = validate_trial(config, workspace.path, chains.subjects.task)
                bank = None if trial is None else prober.trainings(trial)
                found["validate"] = plan_validate(chains, bank)
        if "report" in pending:
            found["report"] = StagePlan("report", "one page", _PAGE, disk_bytes=_PAGE_BYTES)
        return prober.plan(stages, found, statistics, time.monotonic() - started)


def _plan_trainings(
    config: Config, prober: Measured | Analytic, directory: Path, pending: set[str]
) -> dict[str, StagePlan]:
    """Stages train and retrain; times of the retrainings do for the baseline where the engine is the same."""
    first = retrain_trial(config, directory) if config.retrain is not None else baseline_trial(config, directory)
    trainings = alone = prober.trainings(first)
    if "train" in pending and first.jobs[0].stack is not None:
        alone = prober.trainings(baseline_trial(config, directory))
    found = {"train": alone.plan_train()} if "train" in pending else {}
    return found | ({"retrain": trainings.plan_retrain()} if "retrain" in pending else {})


def _together(trainings: StagePlan, chains: StagePlan) -> StagePlan:
    """Stage retrain with the chains between its rounds."""
    return replace(
        trainings,
        what=f"{trainings.what}; {chains.what}",
        seconds=trainings.seconds + chains.seconds,
        process_bytes=max(trainings.process_bytes or 0, chains.process_bytes or 0),
        disk_bytes=trainings.disk_bytes + chains.disk_bytes,
    )


@contextlib.contextmanager
def _workspace(directory: Path, done: list[str]) -> Iterator[RunDirectory]:
    """A run directory for the probe, with what is done of the real one linked into it."""
    # The processes of a cluster see what lies beside the run directory.
    beside = directory.absolute().parent if os.environ.get("RAY_ADDRESS") else None
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="patterning-plan-", dir=beside) as folder:
        run = RunDirectory(Path(folder) / "run")
        for stage, name in (("prepare", "data"), ("train", BASELINE)):
            if stage in done:
                (run.path / name).symlink_to(directory.absolute() / name)
        yield run


def _prepare(config: Config, workspace: RunDirectory) -> StagePlan:
    seconds = Seconds.about(_timed(lambda: prepare(config, workspace, Progress(Console(quiet=True)))), 0.2)
    assert isinstance(config.data, TextConfig)  # others have no such stage
    pool = open_task(config, workspace.path, "cpu").train
    what = f"{len(pool):,} sequences of {config.data.context_length} tokens"
    size = sum(file.stat().st_size for file in (workspace.path / "data").iterdir())
    return StagePlan("prepare", what, seconds, disk_bytes=size)


def _fresh_baseline(config: Config, directory: Path) -> None:
    """Fresh weights where stage train puts the trained ones: they cost as much."""
    task, folder = open_task(config, directory, "cpu"), directory / BASELINE
    folder.mkdir()
    save_model(task.build(config.seed), str(folder / "model.safetensors"), metadata={"format": "pt"})
    task.describe(folder)


def _timed(call: Callable[[], object]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started
