"""`patterning study`: chains x checkpoints x components of a model, reduced to susceptibilities with errors."""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Column, Table
from rich.text import Text

from patterning_dist.config import StudyConfig, dump_config
from patterning_dist.config.sampling import LAYOUT_KEYS
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.sampling.model_study import ModelStudy
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.traces import create_traces, trace_store
from patterning_dist.stages.datatree import study_tree, write_tree
from patterning_dist.stages.study_inputs import unit_fingerprints
from patterning_dist.stages.study_response import (
    SCALE,
    UnitResponse,
    entry_index,
    num_entries,
    study_units,
    unit_response,
    unit_settings,
)
from patterning_dist.stages.unit_analysis import SIGN, UNITS
from patterning_dist.stages.units import Unit, is_current, is_done, sample_units, unit_outputs
from patterning_dist.storage.files import write_json
from patterning_dist.storage.mirror import Place
from patterning_dist.storage.run import RunDirectory, stage_fingerprint

STAGE = "study"
_SHOWN = 6  # findings in full at the end; the others are in a file


def run_study(config: StudyConfig, directory: Path | str, progress: Progress | None = None) -> None:
    """Run the chains of every unit that is not done yet, then write tables, diagnostics and the tree.

    Args:
        config: of the study; it is stored in the run directory, which then replays itself.
        directory: the run directory, a path or a URL; made if missing, locked against other drivers while this runs.
        progress: shows the chains; default: on the terminal.

    Raises:
        PatterningError: whatever the user can put right.
    """
    find_own_code()
    device = resolve_device(config.device)
    with RunDirectory(directory).locked() as run:
        if config.traces is not None and run.place.url is not None:
            raise PatterningError(
                f"traces: the losses of every draw can be kept in a folder that all nodes share, not at {run.place}; "
                "remove the key or choose such a folder with --run-dir"
            )
        study = ModelStudy(config, run.path, device)
        study.check()  # before anything is started
        fingerprints = unit_fingerprints(study, run)
        run.store_config(dump_config(config))
        dumped = config.model_dump(mode="json", exclude={"run_dir": True, "calibration": True, "sampling": LAYOUT_KEYS})
        fingerprint = stage_fingerprint(STAGE, dumped, list(fingerprints.values()))
        with progress or Progress() as shown:
            if run.is_done(STAGE, fingerprint):
                shown.say(f"study: done before, inputs unchanged; see {run.place}")
                run.event(STAGE, "kept")
                return
            with run.stage(STAGE, fingerprint) as outputs:
                units = study_units(study, run, fingerprints)
                diagnostics = _sample(study, run, units, shown)
                responses = [unit_response(study, run, name, diagnostics[name]) for name in units]
                outputs += _write(study, run, units, responses)
        shown.console.print(_summary(responses))
        for line in _advice(responses):
            shown.say(line)
        shown.say(f"study: {run.manifest['stages'][STAGE]['seconds']:.0f} s; results in {run.place}")


def check_study_inputs(config: StudyConfig, directory: Path | str) -> None:
    """Look at model and data without reading the weights of a language model; a module of the user's own is built.

    Raises:
        PatterningError: what is not there, or does not fit together.
    """
    find_own_code()
    resolve_device(config.device)
    ModelStudy(config, Place.at(directory).path, "cpu").check()


def find_own_code() -> None:
    """Let modules beside the experiment be imported, as `python -m` does."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _sample(
    study: ModelStudy, run: RunDirectory, units: dict[str, Unit], progress: Progress
) -> dict[str, dict[str, Any]]:
    """Run the chains of the units that are not done; diagnostics of all."""
    traces = study.config.traces
    if traces is not None:
        for name, unit in units.items():
            if is_done(run, name, unit):
                continue
            store = trace_store(run.path, name)
            if not is_current(run, name, unit, study.config.sampling):
                shutil.rmtree(store, ignore_errors=True)
            if not store.exists():
                create_traces(store, unit.plan.num_chains, unit.plan.num_draws, num_entries(study), traces.thin)
    make_study = partial(open_model_study, study.config, run.place)
    return sample_units(run, study.config.name, STAGE, make_study, study.config.sampling, study.device, units, progress)


def open_model_study(config: StudyConfig, place: Place, device: str, ranks: Ranks) -> ModelStudy:
    """The study in a worker, wherever it is kept."""
    return ModelStudy(config, place.path, device, ranks)


def _write(study: ModelStudy, run: RunDirectory, units: dict[str, Unit], responses: list[UnitResponse]) -> list[Path]:
    """diagnostics.json and the tree; returns the files whose sizes tell that the study is done."""
    config, folder = study.config, run.path / "response"
    diagnostics = folder / "diagnostics.json"
    write_json(diagnostics, {"units": {response.unit: response.diagnostics for response in responses}})
    attributes = {"name": config.name, "seed": config.seed, "units": UNITS, "sign": SIGN, "scale": SCALE}
    attributes["versions"] = run.manifest["versions"]
    nodes: list[tuple[UnitResponse, dict[str, Any]]] = []
    for response in responses:
        settings = unit_settings(config, response.unit)
        if config.traces is not None:
            settings["traces"] = str(trace_store(Path(), response.unit))
        nodes.append((response, settings))
    tree = run.path / "study.zarr"
    write_tree(study_tree(nodes, entry_index(study), attributes), tree)
    return [*unit_outputs(run, units, config.sampling), diagnostics, tree / ".zgroup"]


def _summary(responses: list[UnitResponse]) -> Table:
    table = Table(Column("unit", overflow="fold"), "chains", "LLC", "worst R-hat", "least ESS", "findings", box=None)
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
        table.add_row(Text(response.unit), chains, coefficient, f"{worst:.3f}", f"{least:.0f}", modes)
    return table


def _advice(responses: list[UnitResponse]) -> list[str]:
    """The first few findings in full."""
    lines = [
        f"{response.unit}: {finding['message']}"
        for response in responses
        for finding in response.diagnostics["findings"]
    ]
    more = [f"... and {len(lines) - _SHOWN} more in response/diagnostics.json"] if len(lines) > _SHOWN else []
    return lines[:_SHOWN] + more
