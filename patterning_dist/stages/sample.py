"""Stage ``sample``: checkpoints -> posterior chains -> co-moments -> susceptibilities with errors."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from rich.table import Column, Table
from rich.text import Text

from patterning_dist.config import BASELINE, Config, TextConfig
from patterning_dist.errors import PatterningError
from patterning_dist.measure.measure import measure, write_summaries
from patterning_dist.measure.opening import OpenSubjects
from patterning_dist.measure.results import SubjectResponse
from patterning_dist.measure.subject import HALF_STEP, Subject, expand_components
from patterning_dist.progress import Progress
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.storage.mirror import Location
from patterning_dist.storage.run import RunDirectory
from patterning_dist.tasks.open import open_task

STAGE = "sample"
_NAME_WIDTH = 32  # characters that the name of a subject is given, where it has so many
_SHOWN = 6  # findings in full at the end; the others are in a file


def sample(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Run every chain of every subject on Ray actors, and have its statistics analysed; returns the files written.

    Raises:
        PatterningError: a subject has fewer healthy chains than sampling.min_chains; said as soon as it is certain.
    """
    if config.traces is not None and run.location.url is not None:
        raise PatterningError(
            f"traces: the losses of every draw can be kept in a folder that all nodes share, not at {run.location}; "
            "remove the key or choose such a folder with --run-dir"
        )
    device = resolve_device(config.device)
    opener = open_subjects(config, run.location, device)
    measured = measure(run, config.name, STAGE, opener, device, progress, baseline=config.response.baseline)
    progress.console.print(_summary(measured.responses))
    for line in _advice(measured.responses):
        progress.say(line)
    return [*measured.files, *write_summaries(run, config.name, measured, config.response.num_modes)]


def open_subjects(config: Config, location: Location, device: str) -> OpenSubjects:
    """The subjects of an experiment, checkpoints x components, with what opens them in a worker.

    Raises:
        PatterningError: a component that the model does not have.
    """
    model = open_task(config, location.path, device).skeleton()
    sampling = expand_components(config.sampling, model)
    direction = config.response.direction and config.response.direction.component
    # The direction's component also takes gradients at every draw: its chains are the longest, so they go first.
    components = sorted((c.name for c in sampling.components), key=lambda name: name != direction)
    subjects = {}
    for checkpoint in config.checkpoints:
        for component in components:
            name = subject_name(checkpoint, component)
            # By the name, so that chains at different checkpoints share no noise and no minibatches.
            subjects[name] = Subject(checkpoint, component, stream=name)
            if sampling.extrapolate:  # independent ones
                twin = name + HALF_STEP
                subjects[twin] = Subject(checkpoint, component, stream=twin, half_step=True)
    files = ["data"] if isinstance(config.data, TextConfig) else []
    files += [] if config.model.given_checkpoints else [BASELINE]
    kept = 0 if config.solve is None else config.solve.num_kept_draws
    return OpenSubjects(
        partial(open_task, config),
        location,
        tuple(files),
        sampling,
        config.seed,
        subjects,
        gradients_of=frozenset(name for name, s in subjects.items() if s.component == direction and not s.half_step),
        positions_of=dict.fromkeys(solved_subjects(config, subjects), kept) if kept else {},
        thin=None if config.traces is None else config.traces.thin,
    )


def solved_subjects(config: Config, by_name: Mapping[str, Subject]) -> list[str]:
    """The subjects that section solve names: several only where its component is a pattern."""
    assert config.solve is not None
    checkpoint, wanted = config.solve.checkpoint or config.checkpoints[0], config.solve.component
    there = {name: s.component for name, s in by_name.items() if s.checkpoint == checkpoint and not s.half_step}
    exact = [name for name, component in there.items() if component == wanted]
    return exact or [name for name, component in there.items() if fnmatch.fnmatchcase(component, wanted)]


def subject_name(checkpoint: str, component: str) -> str:
    """What folders and tables call a set of chains: the checkpoint is left out where it is the run's own baseline."""
    return component if checkpoint == BASELINE else f"{checkpoint}/{component}"


def _summary(responses: list[SubjectResponse]) -> Table:
    # Findings are wrapped before names are.
    width = max((len(response.name) for response in responses), default=0)
    subject = Column("subject", overflow="fold", min_width=min(width, _NAME_WIDTH))
    table = Table(subject, "chains", "LLC", "worst R-hat", "least ESS", "findings", box=None)
    for response in responses:
        found = response.diagnostics
        chains = f"{found['num_chains']}"
        if found["excluded"]:
            chains += f" of {found['num_chains'] + len(found['excluded'])}"
        observables = found["observables"].values()
        coefficient = f"{found['llc']['value']:.3g} ± {found['llc']['standard_error']:.1g}"
        modes = ", ".join(dict.fromkeys(finding["mode"] for finding in found["findings"])) or "none"
        # None: of one chain, or of an observable that this component does not move.
        worst = max((entry["rhat"] for entry in observables if entry["rhat"] is not None), default=np.nan)
        least = min((entry["ess_bulk"] for entry in observables if entry["ess_bulk"] is not None), default=np.nan)
        table.add_row(Text(response.name), chains, coefficient, f"{worst:.3f}", f"{least:.0f}", modes)
    return table


def _advice(responses: list[SubjectResponse]) -> list[str]:
    """The first few findings in full."""
    lines = [
        f"{response.name}: {finding['message']}"
        for response in responses
        for finding in response.diagnostics["findings"]
    ]
    more = [f"... and {len(lines) - _SHOWN} more in response/diagnostics.json"] if len(lines) > _SHOWN else []
    return lines[:_SHOWN] + more
