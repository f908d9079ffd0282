"""`patterning plan`: what every stage of an experiment takes, from a short probe of its real pieces.

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
from patterning_dist.config.window import without_window
from patterning_dist.measure.subjects import Subject, Subjects
from patterning_dist.progress import Progress
from patterning_dist.response.cost import Seconds
from patterning_dist.runtime.environment import ray_session, resolve_device
from patterning_dist.runtime.probe.chains import probe_chains
from patterning_dist.runtime.resources import nodes
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.stages.plan.predict import plan_predict
from patterning_dist.stages.plan.sampling import Chains, count_chains, representatives
from patterning_dist.stages.plan.solve import plan_rounds, plan_solve
from patterning_dist.stages.plan.table import Plan, StagePlan
from patterning_dist.stages.plan.training import probe_trainings
from patterning_dist.stages.prepare import prepare
from patterning_dist.stages.rounds import later_rounds
from patterning_dist.stages.sample import open_subjects, solved_subjects
from patterning_dist.stages.windows import plain_subject, window_of
from patterning_dist.storage.run import RunDirectory
from patterning_dist.tasks.open import open_task
from patterning_dist.training.walk import Window

_ON_CHAINS, _ON_TRAININGS = {"sample", "solve", "check", "predict"}, {"train", "retrain"}
_PAGE, _PAGE_BYTES = Seconds(1.5, 1.0, 3.0), 2_000_000  # of the report


def plan_run(config: Config, stages: list[str], directory: Path, done: list[str], say: Callable[[str], None]) -> Plan:
    """Plan the stages of an experiment.

    Args:
        config: of the run.
        stages: that the experiment asks for, in their order; one that is not of the loop is named and not measured.
        directory: of the run, read only, and only if some of its stages are done.
        done: stages that are finished with this configuration.
        say: hears what is being measured.

    Raises:
        PatterningError: whatever the run itself would refuse.
    """
    started, device = time.monotonic(), resolve_device(config.device)
    pending = {stage for stage in stages if stage not in done}
    probed = pending | ({"solve"} if "retrain" in pending and later_rounds(config) else set())
    found = {stage: StagePlan(stage, "", is_done=True) for stage in done}
    with contextlib.ExitStack() as resources:
        workspace = resources.enter_context(_workspace(directory, done))
        if "prepare" in pending:
            say("plan: reading the corpus and training the tokenizer")
            found["prepare"] = _prepare(config, workspace)
        if "train" in pending:
            _fresh_baseline(config, workspace.path)
        cluster: dict[str, float] = {}
        if probed & (_ON_CHAINS | _ON_TRAININGS):
            say("plan: starting Ray")
            seconds = _timed(lambda: resources.enter_context(ray_session(config.sampling.threads_per_worker)))
            found = {"start": StagePlan("start", "Ray, once for all stages", Seconds.about(seconds, 0.3))} | found
            cluster = _cluster()
        if pending & _ON_TRAININGS:
            say("plan: timing optimizer steps, and a training of a few")
            trainings = probe_trainings(config, workspace, device)
            alone = trainings
            if "train" in pending and config.retrain is not None and config.retrain.engine == "stacked":
                alone = probe_trainings(config.model_copy(update={"retrain": None}), workspace, device)
            found |= {"train": alone.plan_train()} if "train" in pending else {}
            found |= {"retrain": trainings.plan_retrain()} if "retrain" in pending else {}
        statistics = 0
        if probed & _ON_CHAINS:
            say("plan: timing chains, measurements and scores")
            chains = _probe_chains(config, workspace, device, probed)
            statistics = chains.statistics_bytes()
            solved = solved_subjects(config, chains.subjects.by_name) if config.solve else []
            found |= {"sample": chains.plan_sample()} if "sample" in pending else {}
            found |= {"solve": plan_solve(chains, solved, workspace.path)} if "solve" in pending else {}
            found |= {"check": chains.plan_check(solved[0])} if "check" in pending else {}
            found |= {"predict": plan_predict(chains)} if "predict" in pending else {}
            if "retrain" in pending and (again := plan_rounds(chains, solved, workspace.path)):
                found["retrain"] = _together(found["retrain"], again)
    if "report" in pending:
        found["report"] = StagePlan("report", "one page", _PAGE, disk_bytes=_PAGE_BYTES)
    ordered = [found.get(stage) or StagePlan(stage, "not measured") for stage in stages]
    ordered = [found["start"], *ordered] if "start" in found else ordered
    shards = config.sampling.aggregator_shards
    return Plan(config.name, device, ordered, statistics, shards, cluster, time.monotonic() - started)


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


def _probe_chains(config: Config, workspace: RunDirectory, device: str, pending: set[str]) -> Chains:
    """Time what stands for all sets of chains, and what pending stages ask of them."""
    opener = open_subjects(config, workspace.location, device)
    subjects: Subjects = opener("cpu", Ranks())
    counts = count_chains(subjects)
    components = {name: subject.component for name, subject in subjects.by_name.items()}
    standing_for = representatives(subjects.task.skeleton(), components, subjects.gradients_of)
    solved = solved_subjects(config, subjects.by_name)[0] if config.solve else ""
    if "sample" in pending:
        wanted = set(standing_for.values())
    else:
        wanted = {standing_for[solved]} if pending & {"solve", "check"} else set[str]()
    direction = config.response.direction if config.solve and config.solve.scores == "response_direction" else None
    probe = probe_chains(
        opener,
        subjects.sampling,
        device,
        {name: name in subjects.gradients_of for name in standing_for if name in wanted},
        sum(subject.num_chains for subject in counts.values()),
        (solved, direction) if direction is not None and "solve" in pending else None,
        _walked(config) if pending & {"solve", "predict"} else None,
    )
    return Chains(config, subjects, counts, standing_for, probe)


def _walked(config: Config) -> tuple[Subject, Window] | None:
    """A subject whose window is walked, by stage predict or for ``solve.max_cost``; None: no arm has one."""
    arms = config.retrain.arm_list if config.retrain is not None and config.predict is not None else []
    lead = next((a for a in arms if a.weights is not None and without_window(config, a) is None), None)
    return None if lead is None else (plain_subject(lead)[1], window_of(config, lead))


def _cluster() -> dict[str, float]:
    there = nodes()
    return {kind: sum(node.total.get(kind, 0) for node in there) for kind in ("CPU", "GPU")} | {"nodes": len(there)}


def _timed(call: Callable[[], object]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started
