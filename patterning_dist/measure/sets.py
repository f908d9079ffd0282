"""Sampling unit by unit, for runs and studies alike: which are done, what is gone on with, and their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from patterning_dist.aggregation.files import CONTROLLED, GRADIENTS, POSITIONS, read_traces, write_unit
from patterning_dist.config import SamplingConfig
from patterning_dist.measure.analysis import Analysis
from patterning_dist.measure.diagnostics import chain_diagnostics
from patterning_dist.progress import Progress
from patterning_dist.response.reliability import reliability_from_sums
from patterning_dist.runtime.chains.run import Events, UnitPlan, UnitResult, run_chains
from patterning_dist.runtime.chains.workers import MakeStudy
from patterning_dist.sampling.lanczos import SpectrumEnds
from patterning_dist.storage.files import write_json
from patterning_dist.storage.run import RunDirectory, stage_fingerprint

_INPUTS = "inputs.json"  # what the chains of a unit follow from; written before they begin
_DIAGNOSTICS = "diagnostics.json"  # written last


@dataclass(frozen=True, kw_only=True)
class Unit(UnitPlan):
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


def sample_units(
    run: RunDirectory,
    name: str,
    stage: str,
    make_study: MakeStudy,
    sampling: SamplingConfig,
    device: str,
    units: Mapping[str, Unit],
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Sample and analyse the units that are not done; chains that were begun are gone on with.

    Args:
        run: directory of the run, locked.
        name: of the run, for metrics.
        stage: for events.
        make_study: opens the study in a worker.
        sampling: section of the experiment.
        device: of the workers.
        units: by name, in the order in which they are begun.
        progress: shows the chains.

    Returns:
        Diagnostics of every unit, see ``chain_diagnostics``.
    """
    units = dict(units)
    for key, unit in units.items():
        identity = stage_fingerprint("chains", {"inputs": unit.fingerprint, "layout": sampling.layout})
        units[key] = replace(unit, ledger=replace(unit.ledger, run=identity))
    for key, unit in units.items():
        if unit.after is not None:
            full = units[unit.after].ledger
            units[key] = replace(unit, analysis=replace(unit.analysis, full=full))
    missing = {key: unit for key, unit in units.items() if not is_done(run, key, unit)}
    # A shard reads its own part of another unit: of one that was cut up otherwise there is none.
    read = {unit.after for unit in missing.values()}
    again = {key for key, unit in units.items() if key in read and not is_current(run, key, unit, sampling)}
    missing = {key: unit for key, unit in units.items() if key in missing or key in again}
    if kept := len(units) - len(missing):
        progress.say(f"{stage}: chains of {kept} of {len(units)} units were done before")
    for key, unit in missing.items():
        if _begin(run, key, unit, sampling):
            run.event(stage, "unit_resumed", unit=key)

    def finished(key: str, result: UnitResult) -> None:
        _write(run, key, missing[key], result)
        for chain, reason in result.parts[0].excluded.items():
            run.event(stage, "chain_excluded", unit=key, chain=chain, reason=reason)
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
    run.place.gather(*(path.relative_to(run.path).as_posix() for path in unit_outputs(run, units, sampling)))
    return {key: _stored(run, key)["diagnostics"] for key in units}


def inputs_of(run: RunDirectory, name: str) -> str:
    """Hash of all that the chains of a unit follow from, once they have begun."""
    return _inputs(run, name)["fingerprint"]


def is_current(run: RunDirectory, name: str, unit: Unit, sampling: SamplingConfig) -> bool:
    """Whether what is there of a unit is of these inputs and this layout."""
    return _inputs(run, name) == {"fingerprint": unit.fingerprint, "layout": sampling.layout}


def unit_outputs(run: RunDirectory, units: Mapping[str, Unit], sampling: SamplingConfig) -> list[Path]:
    """The files of finished units, tables included."""
    found = []
    for name in units:
        folder = f"sampling/{name}"
        for part in ("", *_statistics(sampling), *(f"/shard-{shard}" for shard in range(sampling.aggregator_shards))):
            found += [f"{folder}{part}/{file}" for file in run.storage.names(folder + part)]
        found += _stored(run, name)["files"]
    return [run.path / file for file in found]


def _statistics(sampling: SamplingConfig) -> list[str]:
    """Folders of a unit that statistics of its chains may have."""
    own = (statistic.name for statistic in sampling.statistics)
    return [f"/{name}" for name in (GRADIENTS, POSITIONS, CONTROLLED, *own)]


def _stored(run: RunDirectory, name: str) -> dict[str, Any]:
    return json.loads(run.storage.read(f"sampling/{name}/{_DIAGNOSTICS}"))


def _inputs(run: RunDirectory, name: str) -> dict[str, Any]:
    try:
        return json.loads(run.storage.read(f"sampling/{name}/{_INPUTS}"))
    except (OSError, ValueError):
        return {}


def is_done(run: RunDirectory, name: str, unit: Unit) -> bool:
    """Whether the chains of a unit are through and its tables are there, whatever layout it had."""
    if _inputs(run, name).get("fingerprint") != unit.fingerprint:
        return False
    try:
        stored = _stored(run, name)
    except (OSError, ValueError):
        return False
    return stored["analysis"] == unit.analysis_fingerprint and run.place.sizes(stored["files"]).keys() == set(
        stored["files"]
    )


def _begin(run: RunDirectory, name: str, unit: Unit, sampling: SamplingConfig) -> bool:
    """Clear what is of other inputs or another layout; whether something was there to go on with."""
    folder = f"sampling/{name}"
    run.storage.delete(f"{folder}/{_DIAGNOSTICS}")
    for table in unit.analysis.tables:
        run.storage.clear(table.name)
    if is_current(run, name, unit, sampling):
        return True
    shard, num_shards = 0, _inputs(run, name).get("layout", {}).get("aggregator_shards", 0)
    while shard < num_shards or run.storage.names(f"{folder}/shard-{shard}"):
        run.storage.clear(f"{folder}/shard-{shard}")
        shard += 1
    for statistic in _statistics(sampling):
        run.storage.clear(folder + statistic)
    run.storage.clear(f"{folder}/checkpoints")
    write_json(run.path / folder / _INPUTS, {"fingerprint": unit.fingerprint, "layout": sampling.layout})
    run.publish(run.path / folder / _INPUTS)
    return False


def _write(run: RunDirectory, name: str, unit: Unit, result: UnitResult) -> None:
    """Traces, records and diagnostics of a unit, the last of its files."""
    folder, first = run.path / "sampling" / name, result.parts[0]
    write_unit(folder, unit.ledger.observables, result.records, result.traces)
    by_table = zip(*(part.reliability for part in result.parts), strict=True)
    kinds = ("reliability", "reliability_samples")
    reliability = {kind: reliability_from_sums(np.sum(s, axis=0)) for kind, s in zip(kinds, by_table, strict=False)}
    num_observables = len(unit.ledger.observables)
    diagnostics = chain_diagnostics(
        read_traces(folder, first.chains),
        unit.ledger.observables,
        records=[record for record in result.records if record.chain in first.chains],
        excluded=first.excluded,
        reliability={kind: values[:num_observables] for kind, values in reliability.items()},
        inverse_temperature=unit.inverse_temperature,
        num_coordinates=unit.num_coordinates,
        spectrum=next((SpectrumEnds(*record.spectrum) for record in result.records if record.spectrum), None),
        step_size=unit.step_size,
    )
    diagnostics["controlled"] = {
        name: {kind: values[number] for kind, values in reliability.items()}
        for number, name in enumerate(unit.analysis.controlled, start=num_observables)
    }
    files = [file for part in result.parts for file in part.files]
    content = {"analysis": unit.analysis_fingerprint, "files": files, "diagnostics": diagnostics}
    write_json(folder / _DIAGNOSTICS, content)
    run.publish(folder)
