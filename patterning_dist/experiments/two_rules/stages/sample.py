"""Stage ``sample``: chains around every reference -> LLC, and the responses of LLC and free energy to every string."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from patterning_dist.aggregation.ledger import LedgerPlan
from patterning_dist.config.sampling import LAYOUT_KEYS
from patterning_dist.experiments.two_rules.config import ParenthesesConfig
from patterning_dist.experiments.two_rules.stages.references import read_references
from patterning_dist.experiments.two_rules.study import COMPONENT, BracketStudy, Subject, open_bracket_study
from patterning_dist.models.components import select_component
from patterning_dist.progress import Progress
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.stages.unit_analysis import SIGN, STANDARD_ERROR, UNITS, Analysis, TablePlan
from patterning_dist.stages.units import Unit, sample_units, unit_outputs
from patterning_dist.storage.files import file_sha256, write_json
from patterning_dist.storage.run import RunDirectory, stage_fingerprint


def sample(config: ParenthesesConfig, run: RunDirectory, progress: Progress) -> list[Path]:
    """Sample around every reference under plain weights; returns the files written."""
    subjects = {
        f"{reference.rule}-{number}": Subject(number, "baseline/networks.safetensors", reference.index)
        for number, reference in enumerate(read_references(run.path / "baseline"))
    }
    diagnostics, written = sample_subjects(config, run, "sample", subjects, progress)
    write_json(run.path / "response" / "diagnostics.json", diagnostics)
    return [*written, run.path / "response" / "diagnostics.json"]


def sample_subjects(
    config: ParenthesesConfig, run: RunDirectory, stage: str, subjects: Mapping[str, Subject], progress: Progress
) -> tuple[dict[str, dict[str, Any]], list[Path]]:
    """Run the chains of every subject on Ray actors; diagnostics by subject, and the files written.

    Raises:
        PatterningError: a subject has fewer healthy chains than sampling.min_chains.
    """
    device = resolve_device(config.device)
    study = BracketStudy(config, run.path, device, subjects)
    units = {name: _unit(study, run, name) for name in subjects}
    make_study = partial(open_bracket_study, config, run.place, dict(subjects))
    diagnostics = sample_units(run, config.name, stage, make_study, config.sampling, device, units, progress)
    return diagnostics, unit_outputs(run, units, config.sampling)


def _unit(study: BracketStudy, run: RunDirectory, name: str) -> Unit:
    config, subject = study.config, study.subjects[name]
    sampling = config.sampling.resolve(COMPONENT)
    loss, llc, free_energy = (observable.name for observable in config.sampling.observables)
    files = [run.path / "data" / "train.parquet", run.path / subject.networks]
    files += [run.path / subject.weights] if subject.weights else []
    metadata = {
        "subject": name,
        "observables": [loss, llc, free_energy],
        "units": UNITS,
        "sign": SIGN,
        "loss": "rho_i l_i with rho of mean 1, so that L is their mean; l_i is the loss of string i",
        "inverse_temperature": sampling.inverse_temperature,
        "localization": sampling.localization,
        "standard_error": STANDARD_ERROR,
    }
    strings = study.strings
    table = TablePlan(f"response/{name}.parquet", 0, {"sample_id": np.arange(len(strings), dtype=np.int32)})
    fingerprint = {
        "seed": config.seed,
        "subject": [subject.number, subject.index],
        "files": [file_sha256(file) for file in files],
        "model": config.model.model_dump(mode="json"),
        "sampling": config.sampling.model_dump(mode="json", exclude={*LAYOUT_KEYS, "min_chains"}),
        "device": study.device,
    }
    return Unit(
        fingerprint=stage_fingerprint(name, fingerprint),
        plan=LedgerPlan(
            run="",
            observables=(loss,),
            num_columns=len(strings),
            num_draws=sampling.num_draws,
            num_batches=config.sampling.num_batches,
            num_chains=sampling.num_chains,
        ),
        analysis=Analysis(
            storage=run.storage,
            observables=[loss],
            tables=[table],
            metadata=metadata,
            min_chains=config.sampling.min_chains,
            inverse_temperature=sampling.inverse_temperature,
            llc=[llc],
            free_energy=[free_energy],
        ),
        inverse_temperature=sampling.inverse_temperature,
        num_coordinates=select_component(study.model(name), COMPONENT).num_coordinates,
    )
