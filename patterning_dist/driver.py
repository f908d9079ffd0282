"""The driver: stages of a run in their order, each run again only if its inputs changed."""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from patterning_dist.config import Config, Root, dump_config
from patterning_dist.config.kinds import DEFAULT, find_kind
from patterning_dist.config.sampling import LAYOUT_KEYS
from patterning_dist.errors import PatterningError
from patterning_dist.experiments.experiment import Experiment
from patterning_dist.functions import load_function
from patterning_dist.progress import Progress
from patterning_dist.runtime.environment import ray_session, resolve_device
from patterning_dist.runtime.metrics import Metrics
from patterning_dist.runtime.resources import refuse_too_large
from patterning_dist.storage.mirror import Location
from patterning_dist.storage.run import RunDirectory, in_words, read_manifest, stage_fingerprint

if TYPE_CHECKING:  # imports torch
    from patterning_dist.stages.plan.machine import Machine

# Keys whose values are where a file lies: what counts is the file, whose hash is among the experiment's inputs.
_FILES = ("deepspeed", "probe", "sources", "paths", "tokenizer")


def experiment_of(config: Root) -> Experiment:
    """The kind of an experiment file that was read."""
    return find_kind(config.experiment or DEFAULT)


def of_the_loop(config: Root, command: str) -> Config:
    """The experiment, for a command that knows the sections of the loop.

    Raises:
        PatterningError: it is of another kind, which has its own.
    """
    if isinstance(config, Config):
        return config
    raise PatterningError(
        f"{config.name}: patterning {command} is for the loop, whose sections it reads, and experiment "
        f"'{config.experiment}' has its own; use `patterning run`"
    )


def run_stages(config: Root, stages: list[str] | None, directory: Path | str) -> None:
    """Run stages of a run, skipping those whose inputs have not changed since they finished.

    Args:
        config: of the run; it is stored in the run directory, which then replays itself.
        stages: names, in order; None: all that the experiment asks for.
        directory: the run directory, a path or a URL; made if missing, locked against other drivers while this runs.

    Raises:
        PatterningError: whatever the user can put right.
    """
    experiment = experiment_of(config)
    remarks = experiment.preflight(config, Location.at(directory).path)
    with RunDirectory(directory).locked() as run:
        inputs = experiment.inputs(config, run.manifest)
        run.update_manifest(inputs=inputs, remarks=remarks)
        fingerprints = _fingerprints(experiment, config, inputs)
        wanted = list(fingerprints) if stages is None else stages
        _refuse_stale(run, wanted[0], fingerprints)
        if versions := run.changed_versions():
            run.event("versions", "changed", versions=versions)
            remarks = [*remarks, f"the run goes on with {', '.join(versions)}; stages that are done stand as they are"]
        run.store_config(dump_config(config))
        every = experiment.stages(config)
        with contextlib.ExitStack() as resources:
            progress = resources.enter_context(Progress(keep=run.keep_state))
            for remark in remarks:
                progress.say(remark)
            left = [stage for stage in wanted if every[stage].on_ray and not run.is_done(stage, fingerprints[stage])]
            if left:
                # One Ray for all stages of this call: starting it takes seconds.
                resources.enter_context(ray_session(config.sampling.threads_per_worker))
                if isinstance(config, Config):
                    refuse_too_large(config, resolve_device(config.device), left)
            for stage in wanted:
                if run.is_done(stage, fingerprints[stage]):
                    progress.say(f"{stage}: done before, inputs unchanged")
                    run.event(stage, "kept")
                    continue
                if changed := run.changed_outputs(stage):
                    progress.say(f"{stage}: {in_words(changed)}; it is run again")
                    run.event(stage, "damaged", files=changed)
                progress.enter(stage)
                if every[stage].on_ray:
                    Metrics(run=config.name).enter(stage)
                later = list(fingerprints)[list(fingerprints).index(stage) + 1 :]
                with run.stage(stage, fingerprints[stage], later) as outputs:
                    outputs += load_function(every[stage].function, "stage")(config, run, progress)
                progress.say(f"{stage}: {run.manifest['stages'][stage]['seconds']:.0f} s")
        progress.say(f"results in {run.location}")


def run_calibration(config: Root, directory: Path | str) -> None:
    """Calibrate chains in the folder calibration/ of a run directory; a baseline must have been trained before.

    Args:
        config: of the run; what the run directory says of itself stays as it is.
        directory: the run directory, a path or a URL, locked against other drivers while this runs.

    Raises:
        PatterningError: whatever the user can put right.
    """
    from patterning_dist.stages.calibrate import calibrate

    config, experiment = of_the_loop(config, "calibrate"), experiment_of(config)
    experiment.preflight(config, Location.at(directory).path)
    with RunDirectory(directory).locked() as run, Progress() as progress:
        fingerprints = _fingerprints(experiment, config, experiment.inputs(config, run.manifest))
        _refuse_stale(run, "sample", fingerprints, "calibrate")
        calibrate(config, run, progress)


def plan_experiment(config: Root, directory: Path | str, as_json: bool, machine: Machine | None = None) -> None:
    """Print what every stage of an experiment will take; the run directory is only read.

    Args:
        config: of the run.
        directory: the run directory, a path or a URL: stages that are done there take no time.
        as_json: print JSON instead of a table.
        machine: that is planned for; None: the one that there is.

    Raises:
        PatterningError: whatever the user can put right.
    """
    config = of_the_loop(config, "plan")
    from patterning_dist.stages.plan.plan import plan_run
    from patterning_dist.stages.plan.stand_ins import with_stand_ins

    experiment, say = experiment_of(config), Progress(Console(stderr=True)).say
    with tempfile.TemporaryDirectory(prefix="patterning-plan-") as folder:
        if machine is not None:
            config, assumed = with_stand_ins(config, Path(folder))
            machine = replace(machine, assumed=tuple(assumed))
        for remark in experiment.preflight(config, Location.at(directory).path):
            say(remark)
        manifest, done = read_manifest(directory), []
        if manifest:
            fingerprints = _fingerprints(experiment, config, experiment.inputs(config, manifest))
            run = RunDirectory(directory)
            done = list(takewhile(lambda stage: run.is_done(stage, fingerprints[stage]), fingerprints))
        plan = plan_run(config, list(experiment.stages(config)), Location.at(directory).path, done, say, machine)
    if as_json:
        print(json.dumps(plan.as_json(), indent=2))
    else:
        Console().print(plan.render())


def _refuse_stale(run: RunDirectory, stage: str, fingerprints: dict[str, str], what: str | None = None) -> None:
    """A stage on its own must not be built on results of another configuration, or on damaged ones."""
    for earlier in takewhile(lambda name: name != stage, fingerprints):
        if not run.is_done(earlier, fingerprints[earlier]):
            changed = run.changed_outputs(earlier)
            reason = f": {in_words(changed)}" if changed else ", which is not done with this configuration"
            raise PatterningError(
                f"{run.location}: {what or f'stage {stage}'} needs stage {earlier}{reason}; run `patterning {earlier}` "
                "(or `patterning run`) with the same arguments first"
            )


def _fingerprints(experiment: Experiment, config: Root, inputs: dict[str, Any]) -> dict[str, str]:
    """A hash a stage: its own sections of the configuration, and the hash of the stage before."""
    fingerprints: dict[str, str] = {}
    upstream: list[str] = []
    dumped = config.model_dump(mode="json")
    for name, stage in experiment.stages(config).items():
        sections = {
            section: [_without_locations(section, part.get(section)) for part in (dumped, inputs)]
            for section in stage.sections
        }
        fingerprints[name] = stage_fingerprint(name, sections, upstream)
        upstream = [fingerprints[name]]
    return fingerprints


def _without_locations(section: str, value: Any) -> Any:
    """A section without where files lie, which differs between machines, and how chains are spread over processes."""
    if not isinstance(value, dict):
        return value
    hidden = {*_FILES, *(LAYOUT_KEYS if section == "sampling" else ())}
    return {key: entry for key, entry in value.items() if key not in hidden}
