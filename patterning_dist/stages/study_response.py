"""The units of a study, a checkpoint and a component each: what is sampled, and what their tables say."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from patterning_dist.aggregation.files import read_records, read_traces
from patterning_dist.aggregation.ledger import LedgerPlan
from patterning_dist.config import StudyConfig, TokensConfig
from patterning_dist.config.sampling import LlcConfig
from patterning_dist.sampling.model_study import ModelStudy
from patterning_dist.stages.unit_analysis import SIGN, STANDARD_ERROR, UNITS, Analysis, TablePlan
from patterning_dist.stages.units import Unit
from patterning_dist.storage.files import read_parquet
from patterning_dist.storage.run import RunDirectory

SCALE = "predicted change of an observable: (inverse_temperature / num_training_losses) * sum_i chi_i (rho_i - 1)"


@dataclass(frozen=True)
class UnitResponse:
    """What the healthy chains of one unit say.

    Attributes:
        unit: "<checkpoint>/<component>".
        names: rows of ``chi``: observables, then the quantities of the posterior as a whole.
        chi: of the probe's single losses [row, loss].
        standard_error: of chi, likewise.
        rhat: split R-hat of these losses [loss].
        center_losses: l_i(w*) [loss], nats.
        traces: loss and observables, name -> [chain, draw].
        chains: numbers of the chains in the traces.
        diagnostics: see ``chain_diagnostics``.
    """

    unit: str
    names: list[str]
    chi: np.ndarray
    standard_error: np.ndarray
    rhat: np.ndarray
    center_losses: np.ndarray
    traces: dict[str, np.ndarray]
    chains: tuple[int, ...]
    diagnostics: dict[str, Any]

    @cached_property
    def component(self) -> str:
        return self.unit.partition("/")[2]


def unit_settings(config: StudyConfig, unit: str) -> dict[str, Any]:
    """How the chains of a unit walked, for headers."""
    checkpoint, _, component = unit.partition("/")
    resolved = config.sampling.resolve(component)
    return {
        "checkpoint": checkpoint,
        "component": component,
        "inverse_temperature": resolved.inverse_temperature,
        "localization": resolved.localization,
        "step_size": resolved.step_size,
        "sampler": config.sampling.sampler.model_dump(),
        "batch_size": config.sampling.batch_size,
        "burn_in": resolved.burn_in,
        "steps_between_draws": resolved.steps_between_draws,
        "seed": config.seed,
    }


def study_units(study: ModelStudy, run: RunDirectory, fingerprints: dict[str, str]) -> dict[str, Unit]:
    """What is to be sampled, and how it is analysed, unit by unit."""
    config, sampling = study.config, study.config.sampling
    units = {}
    for name, fingerprint in fingerprints.items():
        component = name.partition("/")[2]
        resolved = sampling.resolve(component)
        quantities = sampling.posterior_quantities
        units[name] = Unit(
            fingerprint=fingerprint,
            plan=LedgerPlan(
                run="",
                observables=tuple(study.observable_names),
                num_columns=study.num_columns,
                num_draws=resolved.num_draws,
                num_batches=sampling.num_batches,
                num_chains=resolved.num_chains,
            ),
            analysis=Analysis(
                storage=run.storage,
                observables=study.observable_names,
                tables=_tables(study, name),
                metadata=unit_settings(config, name)
                | {
                    "observables": row_names(study),
                    "units": UNITS,
                    "sign": SIGN,
                    "scale": SCALE,
                    "num_training_losses": len(study.train) * (study.num_positions or 1),
                    "standard_error": STANDARD_ERROR,
                },
                min_chains=sampling.min_chains,
                inverse_temperature=resolved.inverse_temperature,
                llc=[quantity.name for quantity in quantities if isinstance(quantity, LlcConfig)],
                free_energy=[quantity.name for quantity in quantities if not isinstance(quantity, LlcConfig)],
            ),
            inverse_temperature=resolved.inverse_temperature,
            num_coordinates=study.components[component].num_coordinates,
        )
    return units


def row_names(study: ModelStudy) -> list[str]:
    """Rows of chi: observables, then the quantities of the posterior as a whole, LLCs first."""
    quantities = sorted(study.config.sampling.posterior_quantities, key=lambda q: not isinstance(q, LlcConfig))
    return [*study.observable_names, *(quantity.name for quantity in quantities)]


def unit_response(study: ModelStudy, run: RunDirectory, unit: str, diagnostics: dict[str, Any]) -> UnitResponse:
    """The response of a finished unit from its files."""
    names, columns = row_names(study), ["rhat", "center_loss"]
    columns += [f"{kind}_{name}" for kind in ("chi", "se") for name in names]
    table, _ = read_parquet(run.path / _tables(study, unit)[0].name, columns)
    values = {name: table[name].to_numpy() for name in columns}
    folder = run.path / "sampling" / unit
    excluded = {entry["chain"] for entry in diagnostics["excluded"]}
    chains = tuple(record.chain for record in read_records(folder) if record.chain not in excluded)
    return UnitResponse(
        unit=unit,
        names=names,
        chi=np.stack([values[f"chi_{name}"] for name in names]),
        standard_error=np.stack([values[f"se_{name}"] for name in names]),
        rhat=values["rhat"],
        center_losses=values["center_loss"],
        traces=read_traces(folder, chains),
        chains=chains,
        diagnostics=diagnostics,
    )


def num_entries(study: ModelStudy) -> int:
    """Probe columns that are single losses; the means of samples that have several come after them."""
    return len(study.probe) * (study.num_positions or 1)


def entry_index(study: ModelStudy) -> dict[str, np.ndarray]:
    """Which sample and position every single loss of the probe is of."""
    samples = sample_index(study)
    if study.num_positions is None:
        return samples
    index = {name: np.repeat(column, study.num_positions) for name, column in samples.items()}
    positions = np.arange(1, study.num_positions + 1, dtype=np.int32)
    index["position"] = np.tile(positions, len(study.probe))
    if isinstance(study.config.data, TokensConfig):
        tokens = study.probe_source.tokens(study.probe_ids)
        index["token"] = tokens[:, 1:].ravel().astype(np.int32)
    return index


def sample_index(study: ModelStudy) -> dict[str, np.ndarray]:
    """Numbers of the probe's samples, and their domains where the data has some."""
    if not isinstance(study.config.data, TokensConfig):
        return {"sample_id": study.probe_ids}
    index = {"sequence_id": study.probe_ids}
    domains = study.probe_source.domains
    return index if domains is None else index | {"domain": np.asarray(domains)[study.probe_ids]}


def _tables(study: ModelStudy, unit: str) -> list[TablePlan]:
    """One row a loss, and one a sample where samples have several losses."""
    checkpoint, _, component = unit.partition("/")
    name = f"response/{checkpoint}/susceptibility-{component}"
    tables = [TablePlan(f"{name}.parquet", 0, entry_index(study))]
    if study.num_positions is not None:
        tables.append(TablePlan(f"{name}-samples.parquet", num_entries(study), sample_index(study)))
    return tables
