"""The driver: stages of a run in their order, each run again only if its inputs changed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import Console

from patterning_dist.config import Config, ParenthesesConfig, StudyConfig, dump_config
from patterning_dist.config.sampling import LAYOUT_KEYS
from patterning_dist.errors import PatterningError
from patterning_dist.experiments.two_rules import stages as parentheses
from patterning_dist.progress import Progress
from patterning_dist.runtime.environment import ray_session, resolve_device
from patterning_dist.runtime.metrics import run_metrics
from patterning_dist.sampling.observables import load_function
from patterning_dist.stages.calibrate import calibrate
from patterning_dist.stages.calibration_subject import run_subject
from patterning_dist.stages.plan.plan import plan_run, plan_study
from patterning_dist.stages.prepare import prepare
from patterning_dist.stages.report import report
from patterning_dist.stages.sample import sample
from patterning_dist.stages.solve import solve
from patterning_dist.stages.train import retrain, train
from patterning_dist.storage.files import file_sha256
from patterning_dist.storage.mirror import Place
from patterning_dist.storage.run import STAGES, RunDirectory, read_manifest, stage_fingerprint

RunConfig = Config | ParenthesesConfig
Stage = Callable[[Any, RunDirectory, Progress], list[Path]]
# The stages of an experiment, and the sections that each depends on besides the stages before it.
_PIPELINES: dict[type[RunConfig], dict[str, tuple[Stage, tuple[str, ...]]]] = {
    Config: {
        "prepare": (prepare, ("seed", "data")),
        "train": (train, ("seed", "device", "model", "training")),
        "sample": (sample, ("sampling", "response")),
        "solve": (solve, ("response", "solve")),
        "retrain": (retrain, ("retrain",)),
        "report": (report, ("name",)),
    },
    ParenthesesConfig: {
        "prepare": (parentheses.prepare, ("seed", "task")),
        "train": (parentheses.train, ("device", "model", "training", "references")),
        "sample": (parentheses.sample, ("sampling",)),
        "solve": (parentheses.solve, ("weights", "online", "arms", "check")),
        "retrain": (parentheses.retrain, ()),
        "report": (parentheses.report, ("name",)),
    },
}
_ON_RAY = ("train", "sample", "solve", "retrain")


def run_stages(config: RunConfig, stages: list[str], directory: Path | str) -> None:
    """Run the named stages of a run, skipping those whose inputs have not changed since they finished.

    Args:
        config: of the run; it is stored in the run directory, which then replays itself.
        stages: names out of ``STAGES``, in order.
        directory: the run directory, a path or a URL; made if missing, locked against other drivers while this runs.

    Raises:
        PatterningError: whatever the user can put right.
    """
    _preflight(config)
    with RunDirectory(directory).locked() as run:
        fingerprints = _fingerprints(config, _corpus_hash(config, run))
        _refuse_stale(run, stages[0], fingerprints)
        run.store_config(dump_config(config))
        with contextlib.ExitStack() as resources:
            progress = resources.enter_context(Progress())
            if any(stage in _ON_RAY and not run.is_done(stage, fingerprints[stage]) for stage in stages):
                # One Ray for all stages of this call: starting it takes seconds.
                resources.enter_context(ray_session(config.sampling.threads_per_worker))
            for stage in stages:
                if run.is_done(stage, fingerprints[stage]):
                    progress.say(f"{stage}: done before, inputs unchanged")
                    run.event(stage, "kept")
                    continue
                if stage in _ON_RAY:
                    run_metrics(config.name).stage(stage)
                with run.stage(stage, fingerprints[stage]) as outputs:
                    outputs += _PIPELINES[type(config)][stage][0](config, run, progress)
                progress.say(f"{stage}: {run.manifest['stages'][stage]['seconds']:.0f} s")


def run_calibration(config: Config, directory: Path | str) -> None:
    """Calibrate the chains of a run whose train stage is done, in the folder calibration/ of its directory.

    Args:
        config: of the run; what the run directory says of itself stays as it is.
        directory: the run directory, a path or a URL, locked against other drivers while this runs.

    Raises:
        PatterningError: whatever the user can put right.
    """
    _preflight(config)
    with RunDirectory(directory).locked() as run, Progress() as progress:
        fingerprints = _fingerprints(config, _corpus_hash(config, run))
        _refuse_stale(run, "sample", fingerprints)
        calibrate(run_subject(config, run, fingerprints["train"]), run, progress)


def plan_experiment(config: Config | StudyConfig, directory: Path | str, as_json: bool) -> None:
    """Print what every stage of an experiment will take; the run directory is only read.

    Args:
        config: of a run or a study.
        directory: the run directory, a path or a URL: stages that are done there take no time.
        as_json: print JSON instead of a table.

    Raises:
        PatterningError: whatever the user can put right.
    """
    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if isinstance(config, StudyConfig):
        plan = plan_study(config, Place.at(directory).path, say)
    else:
        _preflight(config)
        manifest, done = read_manifest(directory), []
        if manifest:
            fingerprints = _fingerprints(config, _corpus(config, manifest.get("corpus", {}))["sha256"])
            run = RunDirectory(directory)
            done = list(takewhile(lambda stage: run.is_done(stage, fingerprints[stage]), STAGES))
        plan = plan_run(config, Place.at(directory).path, done, say)
    if as_json:
        print(json.dumps(plan.as_json(), indent=2))
    else:
        Console().print(plan.render())


def _preflight(config: RunConfig) -> None:
    """Refuse now what would otherwise fail after hours: no GPU, an observable that cannot be imported."""
    resolve_device(config.device)
    if os.getcwd() not in sys.path:  # as `python -m` has it: observables of the user's own lie there
        sys.path.append(os.getcwd())
    for observable in config.sampling.observables:
        if observable.kind == "function":
            load_function(observable.path)


def _refuse_stale(run: RunDirectory, stage: str, fingerprints: dict[str, str]) -> None:
    """A stage on its own must not be built on results of another configuration."""
    for earlier in STAGES[: STAGES.index(stage)]:
        if not run.is_done(earlier, fingerprints[earlier]):
            raise PatterningError(
                f"{run.place}: stage {stage} needs stage {earlier}, which is not done with this configuration; "
                f"run `patterning {earlier}` (or `patterning run`) with the same arguments first"
            )


def _fingerprints(config: RunConfig, corpus: str) -> dict[str, str]:
    """A hash a stage: its own sections of the configuration, and the hash of the stage before."""
    fingerprints: dict[str, str] = {}
    upstream = [corpus]
    dumped = config.model_dump(mode="json")
    for stage in STAGES:
        sections = {name: dumped[name] for name in _PIPELINES[type(config)][stage][1]}
        if "sampling" in sections:  # nor how chains are spread over processes
            sections["sampling"] = {k: v for k, v in sections["sampling"].items() if k not in LAYOUT_KEYS}
        for section, key in (("training", "deepspeed"), ("retrain", "deepspeed"), ("sampling", "probe")):
            if section in sections and (path := sections[section].get(key)) is not None:  # nor where a file lies
                sections[section] = sections[section] | {key: file_sha256(Path(path))}
        if "data" in sections:  # the text counts, not the place where it lies: that differs between machines
            sections["data"] = {key: value for key, value in sections["data"].items() if key != "sources"}
        fingerprints[stage] = stage_fingerprint(stage, sections, upstream)
        upstream = [fingerprints[stage]]
    return fingerprints


def _corpus_hash(config: RunConfig, run: RunDirectory) -> str:
    """Hash of the text itself, which the manifest then keeps; see ``_corpus``."""
    if isinstance(config, ParenthesesConfig):
        return ""  # its strings follow from the seed
    corpus = _corpus(config, run.manifest.get("corpus", {}))
    run.update_manifest(corpus=corpus)
    return corpus["sha256"]


def _corpus(config: Config, stored: dict[str, Any]) -> dict[str, Any]:
    """Paths and hash of the text itself, so that an edited corpus is noticed.

    Where the text is gone, a run that was made from these very paths stands as it is.

    Raises:
        PatterningError: a source is missing and there is no such run.
    """
    paths = [str(source.path) for source in config.data.sources]
    missing = [(i, source.path) for i, source in enumerate(config.data.sources) if not source.path.exists()]
    if missing:
        if stored.get("paths") == paths:
            return stored
        raise PatterningError(f"data.sources.{missing[0][0]}.path: {missing[0][1]} is not there; correct the path")
    contents = []
    for source in config.data.sources:
        files = [source.path] if source.path.is_file() else sorted(p for p in source.path.rglob("*") if p.is_file())
        hashes = {str(file.relative_to(source.path.parent)): file_sha256(file) for file in files}
        contents.append([source.domain, source.text_column, hashes])
    return {"paths": paths, "sha256": stage_fingerprint("corpus", {"sources": contents})}
