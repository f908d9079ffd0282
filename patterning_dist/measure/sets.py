"""Sampling subject by subject, for runs and studies alike: which are done, what is gone on with, and their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from patterning_dist.aggregation.files import CONTROLLED, GRADIENTS, POSITIONS, read_traces, write_subject
from patterning_dist.config import SamplingConfig
from patterning_dist.live import measured_words
from patterning_dist.measure.analysis import Analysis
from patterning_dist.measure.diagnostics import chain_diagnostics, in_short
from patterning_dist.progress import Progress
from patterning_dist.response.reliability import reliability_from_sums
from patterning_dist.runtime.chains.attempt import MakeStudy
from patterning_dist.runtime.chains.run import ChainsPlan, ChainsResult, Events, run_chains
from patterning_dist.sampling.lanczos import SpectrumEnds
from patterning_dist.sampling.traces import trace_store
from patterning_dist.storage.files import changed_files, digests_of, write_json
from patterning_dist.storage.run import RunDirectory, stage_fingerprint

_INPUTS = "inputs.json"  # what the chains of a subject follow from; written before they begin
_TRACES = trace_store(Path(), "").name
_DIAGNOSTICS = "diagnostics.json"  # written last


@dataclass(frozen=True, kw_only=True)
class SubjectPlan(ChainsPlan):
    """A set of chains on one component, to be sampled and analysed; the ``run`` of its ledger is set here.

    Attributes:
        fingerprint: hash of all that the chains follow from.
        inverse_temperature: n_beta.
        num_coordinates: free coordinates of the component.
        step_size: eps, where it is the same for all of them.
    """

    analysis: Analysis
    fingerprint: str
    inverse_temperature: float
    num_coordinates: int
    step_size: float | None = None

    @property
    def analysis_fingerprint(self) -> str:
        """Hash of what the tables follow from besides the chains."""
        analysis = self.analysis
        settings = [analysis.min_chains, analysis.baseline, list(analysis.llc), list(analysis.free_energy)]
        return stage_fingerprint("analysis", {"settings": settings, "metadata": dict(analysis.metadata)})


def sample_subjects(
    run: RunDirectory,
    name: str,
    stage: str,
    make_study: MakeStudy,
    sampling: SamplingConfig,
    device: str,
    subjects: Mapping[str, SubjectPlan],
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Sample and analyse the subjects that are not done; chains that were begun are gone on with.

    Args:
        run: directory of the run, locked.
        name: of the run, for metrics.
        stage: for events.
        make_study: opens the study in a worker.
        sampling: section of the experiment.
        device: of the workers.
        subjects: by name, in the order in which they are begun.
        progress: shows the chains.

    Returns:
        Diagnostics of every subject, see ``chain_diagnostics``.
    """
    subjects = dict(subjects)
    for key, subject in subjects.items():
        identity = stage_fingerprint("chains", {"inputs": subject.fingerprint, "layout": sampling.layout})
        subjects[key] = replace(subject, ledger=replace(subject.ledger, run=identity))
    for key, subject in subjects.items():
        if subject.after is not None:
            full = subjects[subject.after].ledger
            subjects[key] = replace(subject, analysis=replace(subject.analysis, full=full))
    missing = {key: subject for key, subject in subjects.items() if not is_done(run, key, subject)}
    # A shard reads its own part of another subject: of one that was cut up otherwise there is none.
    read = {subject.after for subject in missing.values()}
    again = {key for key, subject in subjects.items() if key in read and not is_current(run, key, subject, sampling)}
    missing = {key: subject for key, subject in subjects.items() if key in missing or key in again}
    if kept := len(subjects) - len(missing):
        progress.say(f"{stage}: chains of {kept} of {len(subjects)} subjects were done before")
    for key, subject in missing.items():
        if _begin(run, key, subject, sampling):
            run.event(stage, "subject_resumed", subject=key)
        else:
            run.event(stage, "subject_started", subject=key, chains=subject.ledger.num_chains)

    def finished(key: str, result: ChainsResult) -> None:
        found = in_short(_write(run, key, missing[key], sampling, result))
        run.event(stage, "subject_finished", subject=key, **found)
        progress.measured(key, **found)
        progress.say(f"{key}: {measured_words(found)}")
        for chain, reason in result.parts[0].excluded.items():
            run.event(stage, "chain_excluded", subject=key, chain=chain, reason=reason)
            progress.say(f"{key}: chain {chain} is left out: {reason}")

    if missing:
        run_chains(
            name,
            make_study,
            sampling,
            device,
            run.storage,
            missing,
            Events(finished, lambda kind, **fields: run.event(stage, kind, **fields)),
            progress,
        )
    run.location.gather(*(path.relative_to(run.path).as_posix() for path in subject_outputs(run, subjects, sampling)))
    return {key: _stored(run, key)["diagnostics"] for key in subjects}


def inputs_of(run: RunDirectory, name: str) -> str:
    """Hash of all that the chains of a subject follow from, once they have begun."""
    return _inputs(run, name)["fingerprint"]


def is_current(run: RunDirectory, name: str, subject: SubjectPlan, sampling: SamplingConfig) -> bool:
    """Whether what is there of a subject is of these inputs and this layout, and its chains can be gone on with.

    Losses of every draw are on disk alone, as the chain writes them: where they are damaged, it has to walk again.
    """
    inputs = {"fingerprint": subject.fingerprint, "layout": sampling.layout}
    traces = {file: digest for file, digest in _digests(run, name).items() if _TRACES in Path(file).parts}
    return _inputs(run, name) == inputs and not changed_files(run.path, traces)


def subject_outputs(run: RunDirectory, subjects: Mapping[str, SubjectPlan], sampling: SamplingConfig) -> list[Path]:
    """The files of finished subjects, tables included."""
    found: list[str] = []
    for name in subjects:
        found += [*_files(run, name, sampling), f"sampling/{name}/{_DIAGNOSTICS}", *_stored(run, name)["files"]]
    return [run.path / file for file in found]


def _files(run: RunDirectory, name: str, sampling: SamplingConfig) -> list[str]:
    """What chains of a finished subject have left in its folder, besides its diagnostics."""
    folder, found = f"sampling/{name}", list[str]()
    for part in ("", *_statistics(sampling), *(f"/shard-{shard}" for shard in range(sampling.aggregator_shards))):
        found += [f"{folder}{part}/{file}" for file in run.storage.names(folder + part) if file != _DIAGNOSTICS]
    losses = trace_store(run.path, name)  # only in a folder that all nodes share
    return found + [path.relative_to(run.path).as_posix() for path in sorted(losses.rglob("*")) if path.is_file()]


def _statistics(sampling: SamplingConfig) -> list[str]:
    """Folders of a subject that statistics of its chains may have."""
    own = (statistic.name for statistic in sampling.statistics)
    return [f"/{name}" for name in (GRADIENTS, POSITIONS, CONTROLLED, *own)]


def _stored(run: RunDirectory, name: str) -> dict[str, Any]:
    return _object(run, f"sampling/{name}/{_DIAGNOSTICS}")


def _inputs(run: RunDirectory, name: str) -> dict[str, Any]:
    return _object(run, f"sampling/{name}/{_INPUTS}")


def _object(run: RunDirectory, name: str) -> dict[str, Any]:
    """The object that a JSON file holds; empty where there is none, or it is damaged."""
    try:
        found = json.loads(run.storage.read(name))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _digests(run: RunDirectory, name: str) -> dict[str, str]:
    """SHA-256 of the files of a finished subject by name; earlier versions kept none."""
    found = _stored(run, name).get("sha256")
    return found if isinstance(found, dict) else {}


def is_done(run: RunDirectory, name: str, subject: SubjectPlan) -> bool:
    """Whether the chains of a subject are through and its files are what they were, whatever layout it had."""
    if _inputs(run, name).get("fingerprint") != subject.fingerprint:
        return False
    stored = _stored(run, name)
    if stored.get("analysis") != subject.analysis_fingerprint:
        return False
    tables = stored["files"]
    return run.location.sizes(tables).keys() == set(tables) and not run.changed(_digests(run, name))


def _begin(run: RunDirectory, name: str, subject: SubjectPlan, sampling: SamplingConfig) -> bool:
    """Clear what is of other inputs or another layout; whether something was there to go on with."""
    folder = f"sampling/{name}"
    is_there = is_current(run, name, subject, sampling)
    run.storage.delete(f"{folder}/{_DIAGNOSTICS}")
    for table in subject.analysis.tables:
        run.storage.clear(table.name)
    if is_there:
        return True
    shard, num_shards = 0, _inputs(run, name).get("layout", {}).get("aggregator_shards", 0)
    while shard < num_shards or run.storage.names(f"{folder}/shard-{shard}"):
        run.storage.clear(f"{folder}/shard-{shard}")
        shard += 1
    for statistic in _statistics(sampling):
        run.storage.clear(folder + statistic)
    run.storage.clear(f"{folder}/checkpoints")
    write_json(run.path / folder / _INPUTS, {"fingerprint": subject.fingerprint, "layout": sampling.layout})
    run.publish(run.path / folder / _INPUTS)
    return False


def _write(
    run: RunDirectory, name: str, subject: SubjectPlan, sampling: SamplingConfig, result: ChainsResult
) -> dict[str, Any]:
    """Traces, records and diagnostics of a subject, the last of its files; returns the diagnostics."""
    folder, first = run.path / "sampling" / name, result.parts[0]
    write_subject(folder, subject.ledger.observables, result.records, result.traces)
    by_table = zip(*(part.reliability for part in result.parts), strict=True)
    kinds = ("reliability", "reliability_samples")
    reliability = {kind: reliability_from_sums(np.sum(s, axis=0)) for kind, s in zip(kinds, by_table, strict=False)}
    num_observables = len(subject.ledger.observables)
    diagnostics = chain_diagnostics(
        read_traces(folder, first.chains),
        subject.ledger.observables,
        records=[record for record in result.records if record.chain in first.chains],
        excluded=first.excluded,
        reliability={kind: values[:num_observables] for kind, values in reliability.items()},
        inverse_temperature=subject.inverse_temperature,
        num_coordinates=subject.num_coordinates,
        spectrum=next((SpectrumEnds(*record.spectrum) for record in result.records if record.spectrum), None),
        step_size=subject.step_size,
    )
    diagnostics["controlled"] = {
        name: {kind: values[number] for kind, values in reliability.items()}
        for number, name in enumerate(subject.analysis.controlled, start=num_observables)
    }
    files = [file for part in result.parts for file in part.files]
    run.publish(folder)
    names = [*_files(run, name, sampling), *files]
    run.location.gather(*names)  # tables, and statistics of chains, are written where these run
    content = {
        "analysis": subject.analysis_fingerprint,
        "files": files,
        "sha256": digests_of(run.path, names),
        "diagnostics": diagnostics,
    }
    write_json(folder / _DIAGNOSTICS, content)
    run.publish(folder)
    return diagnostics
