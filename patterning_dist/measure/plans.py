"""From subjects to what is sampled of them, and to the tables that are made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from patterning_dist.aggregation.ledger import LedgerPlan
from patterning_dist.config.sampling import LAYOUT_KEYS, FunctionConfig, PosteriorQuantityConfig
from patterning_dist.data.patterns import INDUCTION, token_patterns
from patterning_dist.functions import code_fingerprint
from patterning_dist.measure.analysis import SIGN, STANDARD_ERROR, UNITS, Analysis, TablePlan
from patterning_dist.measure.results import samples_table_name, table_name
from patterning_dist.measure.sets import SubjectPlan
from patterning_dist.measure.subjects import Subjects
from patterning_dist.models.components import select_component
from patterning_dist.response.susceptibility import Baseline
from patterning_dist.storage.files import file_sha256
from patterning_dist.storage.run import RunDirectory, stage_fingerprint
from patterning_dist.tasks.task import FileHash

SCALE = "predicted change of an observable: (inverse_temperature / num_training_losses) * sum_i chi_i (rho_i - 1)"
# What the chains themselves do not follow from.
_HIDDEN = {*LAYOUT_KEYS, "components", "observables", "probe", "min_chains", "extrapolate"}


def row_names(subjects: Subjects) -> list[str]:
    """Rows of chi: observables, then LLCs, free energies and controlled observables."""
    kinds = ("llc", "free_energy", "controlled")
    return [*subjects.observable_names, *(name for kind in kinds for name in _quantities(subjects, kind))]


def _quantities(subjects: Subjects, kind: str) -> list[str]:
    return [quantity.name for quantity in subjects.sampling.posterior_quantities if quantity.kind == kind]


def subject_settings(subjects: Subjects, name: str) -> dict[str, Any]:
    """How the chains of a subject walked, for headers."""
    subject, sampling = subjects.by_name[name], subjects.sampling
    resolved = sampling.resolve(subject.component, half_step=subject.half_step)
    return {
        "checkpoint": subject.checkpoint,
        "component": subject.component,
        "weights": subject.weights,
        "strength": subject.strength if subject.weights else None,
        "inverse_temperature": resolved.inverse_temperature,
        "localization": resolved.localization,
        "step_size": resolved.step_size,
        "sampler": sampling.sampler.model_dump(),
        "batch_size": sampling.batch_size,
        "gradient": sampling.gradient,
        **({"weight_decay": sampling.weight_decay} if sampling.weight_decay else {}),
        "burn_in": resolved.burn_in,
        "steps_between_draws": resolved.steps_between_draws,
        "seed": subjects.seed,
    }


def subject_plans(
    subjects: Subjects, run: RunDirectory, *, baseline: Baseline = "restricted", sha256: FileHash = file_sha256
) -> dict[str, SubjectPlan]:
    """What is to be sampled, and how it is analysed, subject by subject.

    Args:
        subjects: opened in this process.
        run: directory of the run.
        baseline: of ``susceptibility``; ``full`` needs the subject ``everything`` of every checkpoint.
        sha256: of a file.
    """
    shared = _shared_inputs(subjects, sha256)
    skeleton, tables = subjects.task.skeleton(), _indices(subjects)
    of_task = {c: subjects.task.fingerprint(c, sha256) for c in {s.checkpoint for s in subjects.by_name.values()}}
    plans = {}
    for name, subject in subjects.by_name.items():
        sampling = subjects.sampling
        resolved = sampling.resolve(subject.component, half_step=subject.half_step)
        full = name.rpartition("/")[0] + "/everything" if "/" in name else "everything"
        weights = None if subject.weights is None else sha256(run.path / subject.weights)
        own = {
            "task": of_task[subject.checkpoint],
            "component": resolved.model_dump(),
            "stream": [subject.stream, subject.seed],
            # Chains on weighted losses used to record rho_i l_i.
            "weights": None if weights is None else [weights, subject.strength, "records l_i"],
            "gradients": name in subjects.gradients_of,
            "positions": subjects.positions_of.get(name, 0),
        }
        plans[name] = SubjectPlan(
            fingerprint=stage_fingerprint(name, shared | own),
            ledger=LedgerPlan(
                run="",
                observables=tuple(subjects.observable_names),
                num_columns=sum(len(next(iter(index.values()))) for index in tables),
                num_draws=resolved.num_draws,
                num_batches=sampling.num_batches,
                num_chains=resolved.num_chains,
            ),
            analysis=Analysis(
                storage=run.storage,
                observables=subjects.observable_names,
                tables=_table_plans(name, tables),
                metadata=subject_settings(subjects, name)
                | {
                    "observables": row_names(subjects),
                    "units": UNITS,
                    "sign": SIGN,
                    "scale": SCALE,
                    "num_training_losses": subjects.num_training_losses,
                    "standard_error": STANDARD_ERROR,
                },
                min_chains=sampling.min_chains,
                inverse_temperature=resolved.inverse_temperature,
                baseline=baseline,
                subject=name,
                llc=_quantities(subjects, "llc"),
                free_energy=_quantities(subjects, "free_energy"),
                controlled=_quantities(subjects, "controlled"),
            ),
            inverse_temperature=resolved.inverse_temperature,
            num_coordinates=select_component(skeleton, subject.component).num_coordinates,
            step_size=None if sampling.sampler.kind == "rmsprop_sgld" else resolved.step_size,
            after=full if baseline == "full" and name != full else None,
        )
    return plans


def entry_index(subjects: Subjects) -> dict[str, np.ndarray]:
    """What every probe entry is of: sample, position, what the task knows of both, and the token's pattern [entry]."""
    return _indices(subjects)[0]


def _indices(subjects: Subjects) -> list[dict[str, np.ndarray]]:
    """Of the probe's single losses, and of its samples where these have several, with how many that count.

    chi of a sample as a whole is the sum over its losses, ``num_losses`` times that of their mean.
    """
    task, probe, counted = subjects.task, subjects.probe, subjects.counted
    samples = task.index(probe.source, probe.ids)
    if task.num_positions is None:
        return [samples]
    shape = (len(probe.ids), task.num_positions)
    kept = np.ones(shape, bool) if counted is None else counted
    columns = {name: np.repeat(column, task.num_positions).reshape(shape) for name, column in samples.items()}
    columns["position"] = np.tile(np.arange(1, task.num_positions + 1, dtype=np.int32), (shape[0], 1))
    columns |= task.entries(probe.source, probe.ids)
    if (texts := task.token_texts()) is not None and "token" in columns:
        columns["pattern"] = token_patterns(texts)[columns["token"]]
        for _, mask in task.split(INDUCTION, probe.source, probe.ids) or []:
            columns["pattern"][mask] = INDUCTION
    entries = {name: column[kept] for name, column in columns.items()}
    return [entries, samples | {"num_losses": kept.sum(axis=1, dtype=np.int32)}]


def _table_plans(subject: str, indices: list[dict[str, np.ndarray]]) -> list[TablePlan]:
    tables = [TablePlan(table_name(subject), 0, indices[0])]
    if len(indices) > 1:
        num_entries = len(next(iter(indices[0].values())))
        tables.append(TablePlan(samples_table_name(subject), num_entries, indices[1]))
    return tables


def _shared_inputs(subjects: Subjects, sha256: FileHash) -> dict[str, Any]:
    """What the chains of all subjects follow from."""
    sampling = subjects.sampling
    measured = [o for o in sampling.observables if not isinstance(o, PosteriorQuantityConfig)]
    functions = [o.path for o in measured if isinstance(o, FunctionConfig)] + [s.path for s in sampling.statistics]
    functions += sampling.split_functions
    return {
        "seed": subjects.seed,
        "device": subjects.device,
        "sampling": sampling.model_dump(mode="json", exclude=_HIDDEN),
        "observables": [o.model_dump() for o in (*measured, *sampling.controlled)],
        "functions": [code_fingerprint(path) for path in functions],
        "probe": None if sampling.probe is None else sha256(Path(sampling.probe)),
        "traces": subjects.thin,
        "held_out": subjects.part,
    }
