"""`patterning plan`: what every stage of an experiment will take, from a short probe of its real pieces.

Nothing is written into the run directory: the probe works in a temporary folder.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rich.console import Console
from safetensors.torch import save_file

from patterning_dist.config import Config, StudyConfig
from patterning_dist.models.attention import build_model
from patterning_dist.progress import Progress
from patterning_dist.response.cost import NOTHING, Seconds
from patterning_dist.runtime.environment import ray_session, resolve_device
from patterning_dist.runtime.probe.chains import probe_chains
from patterning_dist.runtime.probe.training import JobTimes, StepTimes, probe_job, probe_steps
from patterning_dist.runtime.resources import nodes
from patterning_dist.sampling.model_study import ModelStudy
from patterning_dist.sampling.study import Study, open_study
from patterning_dist.stages.plan import training
from patterning_dist.stages.plan.sampling import (
    SamplingShape,
    count_units,
    reduction_seconds,
    representatives,
    statistics_bytes,
)
from patterning_dist.stages.plan.stages import plan_chains, plan_retrain, plan_solve, plan_train
from patterning_dist.stages.plan.table import Plan, StagePlan
from patterning_dist.stages.prepare import prepare
from patterning_dist.stages.study import STAGE, find_own_code, open_model_study
from patterning_dist.stages.train import train
from patterning_dist.storage.mirror import Place
from patterning_dist.storage.run import STAGES, RunDirectory
from patterning_dist.training.job import TrainingJob

_PAGE_BYTES = 2_000_000


def plan_run(config: Config, directory: Path, done: list[str], say: Callable[[str], None]) -> Plan:
    """Plan a whole run.

    Args:
        config: of the run.
        directory: of the run, read only, and only if some of its stages are done.
        done: stages that are finished with this configuration.
        say: is told what is being measured.

    Raises:
        PatterningError: whatever the run itself would refuse.
    """
    find_own_code()
    started = time.monotonic()
    device = resolve_device(config.device)
    pending = [stage for stage in STAGES if stage not in done]
    with contextlib.ExitStack() as resources:
        workspace = resources.enter_context(_workspace(directory, done))
        prepare_seconds = NOTHING
        if "prepare" in pending:
            say("plan: reading the corpus and training the tokenizer")
            prepare_seconds = Seconds.about(_timed(lambda: prepare(config, workspace, _quiet())), 0.2)
        study = Study(config, workspace.path, device)
        if "train" in pending:
            _untrained(config, study, workspace.path / "baseline" / "model.safetensors")
        starting, cluster, steps, job, chains = NOTHING, {}, None, None, None
        if {"sample", "solve", "retrain"} & set(pending):
            say("plan: starting Ray")
            seconds = _timed(lambda: resources.enter_context(ray_session(config.sampling.threads_per_worker)))
            starting, cluster = Seconds.about(seconds, 0.3), _cluster()
        if "retrain" in pending:
            say("plan: timing optimizer steps")
            retraining, number = _job(config, workspace.path), training.num_retrainings(config)
            steps = probe_steps(config, workspace.path, retraining, device, number)
            say("plan: timing a training of a few steps")
            job = _probe_train(config, workspace, steps)
        shape = _run_shape(config, study)
        counts = count_units(config.sampling)
        standing_for = representatives(study.checkpoint(), list(counts), shape.gradients_of)
        if {"sample", "solve"} & set(pending):
            say("plan: timing chains, measurements and scores")
            chains = probe_chains(
                partial(open_study, config, workspace.place),
                config.sampling,
                device,
                {name: name == shape.gradients_of for name in dict.fromkeys(standing_for.values())},
                sum(unit.num_chains for unit in counts.values()),
                config.solve.component if "solve" in pending else None,
            )
        stages = [StagePlan("start", "Ray, once for all stages", starting)] if cluster else []
        for stage in STAGES:
            if stage in done:
                stages.append(StagePlan(stage, "", is_done=True))
            elif stage == "prepare":
                size = sum(file.stat().st_size for file in (workspace.path / "data").iterdir())
                what = f"{study.pool.num_sequences:,} sequences of {study.pool.context_length} tokens"
                stages.append(StagePlan(stage, what, prepare_seconds, disk_bytes=size))
            elif stage == "train":
                stages.append(plan_train(config, job, steps))
            elif stage == "sample":
                reduction = reduction_seconds(counts, config.sampling, shape)
                stages.append(plan_chains(stage, config, counts, standing_for, chains, shape, reduction))
            elif stage == "solve":
                unit = counts[config.solve.component]
                seconds = training.solve_seconds(config, study, unit, chains, workspace.path)
                coordinates = chains.units[standing_for[config.solve.component]].num_coordinates
                stages.append(plan_solve(config, study, unit, coordinates, chains, seconds))
            elif stage == "retrain":
                stages.append(plan_retrain(config, job, steps))
            else:
                evaluation = steps.evaluation if steps else Seconds(0.3, 0.1, 1.0)
                stages.append(
                    StagePlan(stage, "one page", training.report_seconds(config, evaluation), disk_bytes=_PAGE_BYTES)
                )
    shards = config.sampling.aggregator_shards
    statistics = statistics_bytes(counts, config.sampling, shape)
    return Plan(config.name, device, stages, statistics, shards, cluster, time.monotonic() - started)


def plan_study(config: StudyConfig, directory: Path, say: Callable[[str], None]) -> Plan:
    """Plan a study: all its chains, and the tables made of them; arguments as of ``plan_run``."""
    find_own_code()
    started = time.monotonic()
    device = resolve_device(config.device)
    study = ModelStudy(config, directory, device)
    study.check()
    shape = SamplingShape(len(study.observable_names), study.num_columns, 0, None)
    own = count_units(config.sampling)
    checkpoints = config.model.checkpoints
    standing_for = representatives(study.model(checkpoints[0]), list(own), None)
    counts = {f"{checkpoint}/{name}": unit for checkpoint in checkpoints for name, unit in own.items()}
    # A checkpoint costs what another one does.
    standing_for = {unit: f"{checkpoints[0]}/{standing_for[unit.partition('/')[2]]}" for unit in counts}
    with contextlib.ExitStack() as resources:
        say("plan: starting Ray")
        seconds = _timed(lambda: resources.enter_context(ray_session(config.sampling.threads_per_worker)))
        cluster = _cluster()
        say("plan: timing chains and measurements")
        chains = probe_chains(
            partial(open_model_study, config, Place.at(directory)),
            config.sampling,
            device,
            {unit: False for unit in dict.fromkeys(standing_for.values())},
            sum(unit.num_chains for unit in counts.values()),
        )
        reduction = reduction_seconds(counts, config.sampling, shape)
    stage = plan_chains(STAGE, config, counts, standing_for, chains, shape, Seconds.about(seconds, 0.3) + reduction)
    statistics = statistics_bytes(counts, config.sampling, shape)
    shards = config.sampling.aggregator_shards
    return Plan(config.name, device, [stage], statistics, shards, cluster, time.monotonic() - started)


@contextlib.contextmanager
def _workspace(directory: Path, done: list[str]) -> Iterator[RunDirectory]:
    """A run directory for the probe, with what is done of the real one linked into it."""
    # The processes of a cluster see what lies beside the run directory.
    beside = directory.absolute().parent if os.environ.get("RAY_ADDRESS") else None
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="patterning-plan-", dir=beside) as folder:
        run = RunDirectory(Path(folder) / "run")
        for stage, name in (("prepare", "data"), ("train", "baseline")):
            if stage in done:
                (run.path / name).symlink_to(directory.absolute() / name)
        yield run


def _probe_train(config: Config, workspace: RunDirectory, steps: StepTimes) -> JobTimes:
    """A few steps of the baseline in a folder of their own: the checkpoint of the workspace may be the real one."""
    run = RunDirectory(workspace.path.parent / "training")
    (run.path / "data").symlink_to(workspace.path / "data")
    # Ranks that share a batch take about as long a step as one that has it to itself.
    return probe_job(
        config, run.path / "baseline", lambda short: train(short, run, _quiet()), steps.step, steps.evaluation
    )


def _job(config: Config, directory: Path) -> TrainingJob:
    """A retraining as ``stages.train`` makes them, without weights."""
    return TrainingJob(
        name="probe",
        folder=directory / "retrain",
        inputs=[],
        seed=config.seed,
        num_steps=config.retrain.num_steps,
        evaluate_every=config.retrain.evaluate_every,
        deepspeed=config.retrain.deepspeed,
        num_workers=config.retrain.num_workers,
    )


def _untrained(config: Config, study: Study, path: Path) -> None:
    """Fresh weights in the place of the checkpoint: they cost as much."""
    model = build_model(config.model, study.pool.vocabulary_size, study.pool.context_length, seed=config.seed)
    path.parent.mkdir()
    save_file(model.state_dict(), path)


def _run_shape(config: Config, study: Study) -> SamplingShape:
    num_sequences, num_positions = study.probe_tokens.shape
    return SamplingShape(
        len(study.observable_names),
        num_sequences * num_positions,  # a loss a predicted token, and a mean a sequence
        len(study.splits.names),
        config.response.direction.component,
    )


def _cluster() -> dict[str, float]:
    there = nodes()
    return {kind: sum(node.total.get(kind, 0) for node in there) for kind in ("CPU", "GPU")} | {"nodes": len(there)}


def _timed(call: Callable[[], object]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started


def _quiet() -> Progress:
    return Progress(Console(quiet=True))
