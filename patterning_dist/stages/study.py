"""`patterning study`: chains x checkpoints x components of a model, reduced to susceptibilities with errors."""

from __future__ import annotations

import json
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
from patterning_dist.files import write_json
from patterning_dist.progress import Progress
from patterning_dist.response.ledger import Ledger
from patterning_dist.rundir import RunDirectory, stage_fingerprint
from patterning_dist.runtime.chains import run_chains
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.sampling.model_study import ModelStudy
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.traces import create_traces, trace_store
from patterning_dist.stages.datatree import study_tree, write_tree
from patterning_dist.stages.study_inputs import unit_fingerprints
from patterning_dist.stages.study_response import (
    SCALE,
    UNITS,
    UnitResponse,
    entry_index,
    num_entries,
    unit_response,
    unit_settings,
    write_tables,
)
from patterning_dist.stages.susceptibilities import SIGN

STAGE = "study"
_FILES = ("moments.npz", "traces.parquet", "arrays.npz", "chains.json")
# Which inputs the files of a unit belong to; written before its chains begin.
_INPUTS = "inputs.json"
_SHOWN = 6  # findings in full at the end; the others are in a file


def run_study(config: StudyConfig, directory: Path, progress: Progress | None = None) -> None:
    """Run the chains of every unit that is not done yet, then write tables, diagnostics and the tree.

    Args:
        config: of the study; it is stored in the run directory, which then replays itself.
        directory: the run directory; made if missing, locked against other drivers while this runs.
        progress: shows the chains; default: on the terminal.

    Raises:
        PatterningError: whatever the user can put right.
    """
    find_own_code()
    device = resolve_device(config.device)
    with RunDirectory(directory).locked() as run:
        study = ModelStudy(config, run.path, device)
        study.check()  # before anything is started
        units = unit_fingerprints(study, run)
        run.store_config(dump_config(config))
        dumped = config.model_dump(mode="json", exclude={"run_dir", "calibration"})
        fingerprint = stage_fingerprint(STAGE, dumped, list(units.values()))
        with progress or Progress() as shown:
            if run.is_done(STAGE, fingerprint):
                shown.say(f"study: done before, inputs unchanged; see {run.path}")
                run.event(STAGE, "kept")
                return
            with run.stage(STAGE, fingerprint) as outputs:
                _sample(study, run, units, shown)
                responses = [unit_response(study, run.path / "sampling" / unit, unit) for unit in units]
                outputs += _write(study, run, responses)
        shown.console.print(_summary(responses))
        for line in _advice(responses):
            shown.say(line)
        shown.say(f"study: {run.manifest['stages'][STAGE]['seconds']:.0f} s; results in {run.path}")


def check_study_inputs(config: StudyConfig, directory: Path) -> None:
    """Look at model and data without reading the weights of a language model; a module of the user's own is built.

    Raises:
        PatterningError: what is not there, or does not fit together.
    """
    find_own_code()
    resolve_device(config.device)
    ModelStudy(config, directory, "cpu").check()


def find_own_code() -> None:
    """Let modules beside the experiment be imported, as `python -m` does."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _sample(study: ModelStudy, run: RunDirectory, units: dict[str, str], progress: Progress) -> None:
    """Run the chains of the units whose files are not those of these inputs."""
    sampling, folder = study.config.sampling, run.path / "sampling"
    missing = [unit for unit, fingerprint in units.items() if not _is_done(folder / unit, fingerprint)]
    if kept := len(units) - len(missing):
        progress.say(f"study: chains of {kept} of {len(units)} units were done before")
    if not missing:
        return
    ledgers, tasks = {}, []
    for unit in missing:
        planned = sampling.resolve(unit.partition("/")[2])
        ledgers[unit] = Ledger(study.observable_names, study.num_columns, planned.num_draws, sampling.num_batches)
        tasks += [(unit, chain) for chain in range(planned.num_chains)]
        for name in _FILES:
            (folder / unit / name).unlink(missing_ok=True)
        write_json(folder / unit / _INPUTS, {"fingerprint": units[unit]})
        store = trace_store(run.path, unit)
        shutil.rmtree(store, ignore_errors=True)
        if study.config.traces is not None:
            thin = study.config.traces.thin
            create_traces(store, planned.num_chains, planned.num_draws, num_entries(study), thin)
    make_study = partial(open_model_study, study.config, run.path)
    records = run_chains(make_study, sampling, study.device, folder, ledgers, tasks, progress)
    for (unit, _), record in zip(tasks, records, strict=True):
        if not record.healthy:
            run.event(STAGE, "chain_excluded", unit=unit, chain=record.chain, reason=record.reason)
            progress.say(f"{unit}: chain {record.chain} is left out: {record.reason}")


def open_model_study(config: StudyConfig, directory: Path, device: str, ranks: Ranks) -> ModelStudy:
    """The study in a worker."""
    return ModelStudy(config, directory, device, ranks)


def _is_done(folder: Path, fingerprint: str) -> bool:
    try:
        stored = json.loads((folder / _INPUTS).read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError):
        return False
    return stored == fingerprint and all((folder / name).is_file() for name in _FILES)


def _write(study: ModelStudy, run: RunDirectory, responses: list[UnitResponse]) -> list[Path]:
    """Tables, diagnostics.json and the tree; returns the files whose sizes tell that the study is done."""
    config, folder = study.config, run.path / "response"
    files = [run.path / "sampling" / response.unit / name for response in responses for name in _FILES]
    for response in responses:
        files += write_tables(study, response, folder / response.unit.partition("/")[0])
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
    return [*files, diagnostics, tree / ".zgroup"]


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
        # NaN: of one chain, or of an observable that this component does not move.
        worst = max((entry["rhat"] for entry in observables if np.isfinite(entry["rhat"])), default=np.nan)
        least = min((entry["ess_bulk"] for entry in observables if np.isfinite(entry["ess_bulk"])), default=np.nan)
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
