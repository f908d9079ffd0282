"""Stage ``sample``: the checkpoint w* -> posterior chains -> co-moments -> susceptibilities with errors."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from patterning_dist.aggregation.ledger import LedgerPlan
from patterning_dist.config import Config
from patterning_dist.config.sampling import LAYOUT_KEYS
from patterning_dist.models.components import select_component
from patterning_dist.progress import Progress
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.sampling.study import Study, open_study
from patterning_dist.stages.susceptibilities import write_response
from patterning_dist.stages.unit_analysis import SIGN, STANDARD_ERROR, UNITS, Analysis, TablePlan
from patterning_dist.stages.units import Unit, sample_units, unit_outputs
from patterning_dist.storage.files import file_sha256
from patterning_dist.storage.run import RunDirectory, stage_fingerprint

STAGE = "sample"


def sample(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Run every chain of every component on Ray actors, and have its statistics analysed; returns the files written.

    Raises:
        PatterningError: a component has fewer healthy chains than sampling.min_chains; said as soon as it is certain.
    """
    study = Study(config, run.path, resolve_device(config.device))
    # The direction's component also takes gradients at every draw: its chains are the longest, so they go first.
    names = sorted(
        (c.name for c in config.sampling.components), key=lambda name: name != config.response.direction.component
    )
    units = _units(study, run, names)
    make_study = partial(open_study, config, run.place)
    diagnostics = sample_units(run, config.name, STAGE, make_study, config.sampling, study.device, units, progress)
    in_order = {c.name: diagnostics[c.name] for c in config.sampling.components}
    return unit_outputs(run, units, config.sampling) + write_response(study, run, in_order)


def _units(study: Study, run: RunDirectory, names: list[str]) -> dict[str, Unit]:
    config, sampling = study.config, study.config.sampling
    inputs = [run.path / "data" / "train.parquet", run.path / "data" / "validation.parquet"]
    inputs += [run.path / "baseline" / "model.safetensors", *filter(None, [sampling.probe])]
    hidden = {*LAYOUT_KEYS, "components", "probe", "min_chains"}
    shared = {
        "seed": config.seed,
        "files": [file_sha256(file) for file in inputs],
        "sampling": sampling.model_dump(mode="json", exclude=hidden),
        "device": study.device,
    }
    is_full = config.response.baseline == "full"
    model, units = study.checkpoint(), {}
    for name in names:
        resolved = sampling.resolve(name)
        takes_gradients = name == config.response.direction.component
        posterior = study.posterior(name)
        own = {"component": resolved.model_dump(), "gradients": takes_gradients}
        metadata = {
            "component": name,
            "observables": study.observable_names,
            "units": UNITS,
            "sign": SIGN,
            "inverse_temperature": posterior.inverse_temperature,
            "localization": posterior.localization,
            "num_pool_tokens": study.num_pool_tokens,
            "standard_error": STANDARD_ERROR,
        }
        units[name] = Unit(
            fingerprint=stage_fingerprint(name, shared | own),
            plan=LedgerPlan(
                run="",
                observables=tuple(study.observable_names),
                num_columns=sum(len(next(iter(table.index.values()))) for table in _tables(study, name)),
                num_draws=resolved.num_draws,
                num_batches=sampling.num_batches,
                num_chains=resolved.num_chains,
            ),
            analysis=Analysis(
                storage=run.storage,
                observables=study.observable_names,
                tables=_tables(study, name),
                metadata=metadata,
                min_chains=sampling.min_chains,
                inverse_temperature=posterior.inverse_temperature,
                baseline=config.response.baseline,
            ),
            inverse_temperature=posterior.inverse_temperature,
            num_coordinates=select_component(model, name).num_coordinates,
            after="everything" if is_full and name != "everything" else None,
        )
    return units


def _tables(study: Study, component: str) -> list[TablePlan]:
    """Probe columns: every token's loss, then every sequence's mean."""
    tokens, domains = study.probe_tokens, study.probe_source.domains[study.probe_ids]
    num_sequences, num_positions = tokens.shape[0], tokens.shape[1] - 1
    per_token = {
        "sequence_id": np.repeat(study.probe_ids, num_positions),
        "position": np.tile(np.arange(1, num_positions + 1, dtype=np.int16), num_sequences),
        "token": tokens[:, 1:].ravel().astype(np.int32),
        "domain": np.repeat(domains, num_positions),
    }
    per_sequence = {"sequence_id": study.probe_ids, "domain": domains}
    name = f"response/susceptibility-{component}"
    return [
        TablePlan(f"{name}.parquet", 0, per_token),
        TablePlan(f"{name}-sequences.parquet", num_sequences * num_positions, per_sequence),
    ]
