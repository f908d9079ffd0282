"""From subjects to susceptibilities with errors, diagnostics and tables: one way for every kind of experiment."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patterning_dist.measure.analysis import SIGN, UNITS
from patterning_dist.measure.datatree import response_tree, write_tree
from patterning_dist.measure.groups import write_groups
from patterning_dist.measure.modes import write_modes
from patterning_dist.measure.opening import OpenSubjects
from patterning_dist.measure.plans import SCALE, entry_index, row_names, subject_plans, subject_settings
from patterning_dist.measure.results import SubjectResponse, read_response
from patterning_dist.measure.sets import SubjectPlan, is_current, is_done, sample_subjects, subject_outputs
from patterning_dist.measure.step_sizes import extrapolate_steps
from patterning_dist.measure.subjects import Subjects
from patterning_dist.progress import Progress
from patterning_dist.response.susceptibility import Baseline
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.traces import create_traces, trace_store
from patterning_dist.storage.files import FileHashes, write_json
from patterning_dist.storage.run import RunDirectory

DIAGNOSTICS = "response/diagnostics.json"


@dataclass(frozen=True)
class Measured:
    """What the chains of all subjects came to.

    Attributes:
        subjects: opened in this process.
        responses: of every subject, in order.
        files: written, under the run directory.
        baseline: of ``susceptibility``.
    """

    subjects: Subjects
    responses: list[SubjectResponse]
    files: list[Path]
    baseline: Baseline = "restricted"

    @property
    def diagnostics(self) -> dict[str, dict[str, Any]]:
        """By subject, see ``chain_diagnostics``."""
        return {response.name: response.diagnostics for response in self.responses}


def measure(
    run: RunDirectory,
    name: str,
    stage: str,
    opener: OpenSubjects,
    device: str,
    progress: Progress,
    *,
    baseline: Baseline = "restricted",
) -> Measured:
    """Run the chains of every subject that is not done on Ray, and have the aggregator's shards analyse them.

    Args:
        run: directory of the run, locked.
        name: of the run, for metrics.
        stage: for events.
        opener: opens the subjects, here and in the workers.
        device: of the workers.
        progress: shows the chains.
        baseline: of ``susceptibility``.

    Raises:
        PatterningError: a subject has fewer healthy chains than sampling.min_chains; said as soon as it is certain.
    """
    subjects = opener(device, Ranks())
    hashes = FileHashes(run.manifest.get("hashes", {}))
    plans = subject_plans(subjects, run, baseline=baseline, sha256=hashes)
    run.update_manifest(hashes=hashes.known)
    if opener.thin is not None:
        _prepare_traces(subjects, run, plans, opener.thin)
    diagnostics = sample_subjects(run, name, stage, opener, opener.sampling, device, plans, progress)
    rows = row_names(subjects)
    responses = [read_response(run, subject, rows, diagnostics[subject]) for subject in plans]
    return Measured(subjects, responses, subject_outputs(run, plans, opener.sampling), baseline)


def write_summaries(run: RunDirectory, name: str, measured: Measured, num_modes: int) -> list[Path]:
    """Write what is made of all subjects together; returns the files.

    Diagnostics, modes over heads, mean chi of groups of entries, the tree.
    """
    subjects, responses = measured.subjects, measured.responses
    index, files, modes = entry_index(subjects), [], {}
    for checkpoint in dict.fromkeys(s.checkpoint for s in subjects.by_name.values()):
        heads = [
            key
            for key, subject in subjects.by_name.items()
            if subject.checkpoint == checkpoint
            and ".head." in subject.component
            and "+" not in subject.component
            and not subject.half_step
        ]
        if len(heads) > 1:
            modes[checkpoint], written = write_modes(run, heads, subjects.observable_names[0], num_modes, index)
            files += written
    files += write_groups(run, subjects, measured.diagnostics, index, measured.baseline)
    at_0, tables = extrapolate_steps(run, subjects, responses)
    described = {key: entry | at_0.get(key, {}) for key, entry in measured.diagnostics.items()}
    content = {"subjects": described, "modes": modes}
    write_json(run.path / DIAGNOSTICS, content)
    attributes = {"name": name, "seed": subjects.seed, "units": UNITS, "sign": SIGN, "scale": SCALE}
    attributes["versions"] = run.manifest.get("versions")
    nodes: list[tuple[SubjectResponse, dict[str, Any]]] = []
    for response in responses:
        settings = subject_settings(subjects, response.name)
        if subjects.thin is not None:
            settings["traces"] = str(trace_store(Path(), response.name))
        nodes.append((response, settings))
    tree = run.path / "response.zarr"
    write_tree(response_tree(nodes, index, attributes), tree)
    return [*(run.path / file for file in files), *tables, run.path / DIAGNOSTICS, tree]


def _prepare_traces(subjects: Subjects, run: RunDirectory, plans: dict[str, SubjectPlan], thin: int) -> None:
    """Empty stores for the probe losses of the draws that are to come."""
    num_entries = len(next(iter(entry_index(subjects).values())))
    for name, plan in plans.items():
        if is_done(run, name, plan):
            continue
        store = trace_store(run.path, name)
        if not is_current(run, name, plan, subjects.sampling):
            shutil.rmtree(store, ignore_errors=True)
        if not store.exists():
            create_traces(store, plan.ledger.num_chains, plan.ledger.num_draws, num_entries, thin)
