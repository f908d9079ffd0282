"""From the co-moments of one unit of a study, a checkpoint and a component, to its tables and diagnostics."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.config import StudyConfig, TokensConfig
from patterning_dist.config.sampling import LlcConfig
from patterning_dist.files import write_parquet
from patterning_dist.response.diagnostics import split_rhat
from patterning_dist.response.ledger import read_chains
from patterning_dist.response.llc import free_energy_response, llc_response
from patterning_dist.response.susceptibility import Susceptibility, susceptibility
from patterning_dist.sampling.model_study import ModelStudy
from patterning_dist.stages.chain_diagnostics import chain_diagnostics, read_traces
from patterning_dist.stages.susceptibilities import SIGN

UNITS = "chi and se: nats times the unit of the observable; center_loss: nats"
SCALE = "predicted change of an observable: (inverse_temperature / num_training_losses) * sum_i chi_i (rho_i - 1)"


@dataclass(frozen=True)
class UnitResponse:
    """What the healthy chains of one unit say.

    Attributes:
        unit: "<checkpoint>/<component>".
        names: rows of ``chi``: observables, then the quantities of the posterior as a whole.
        chi: [row, probe column].
        standard_error: of chi, likewise.
        rhat: split R-hat of the probe losses [probe column].
        center_losses: l_i(w*) [probe column], nats.
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


def unit_response(study: ModelStudy, folder: Path, unit: str) -> UnitResponse:
    """chi of every observable with errors, and diagnostics, from the files of a unit.

    Args:
        study: the unit is of.
        folder: of the unit under ``sampling/``.
        unit: "<checkpoint>/<component>".

    Raises:
        PatterningError: too few healthy chains.
    """
    sampling = study.config.sampling
    chains, excluded = read_chains(folder)
    common = {"loss_weights": entry_columns(study), "min_chains": sampling.min_chains, "excluded": excluded}
    measured = susceptibility(chains, **common)
    with np.load(folder / "arrays.npz") as arrays:
        center_losses = arrays[f"{measured.chains[0]}/center_losses"]
    component = unit.partition("/")[2]
    n_beta = sampling.resolve(component).inverse_temperature
    rows: list[Susceptibility] = [measured]
    for quantity in sampling.posterior_quantities:
        if isinstance(quantity, LlcConfig):
            rows.append(llc_response(chains, 0, n_beta, **common))  # component losses are the first rows
        else:
            rows.append(free_energy_response(chains, center_losses, **common))
    diagnostics = chain_diagnostics(
        folder,
        study.observable_names,
        measured,
        num_entries=num_entries(study),
        inverse_temperature=n_beta,
        num_coordinates=study.components[component].num_coordinates,
    )
    return UnitResponse(
        unit=unit,
        names=[*study.observable_names, *(quantity.name for quantity in sampling.posterior_quantities)],
        chi=np.concatenate([row.chi for row in rows]),
        standard_error=np.concatenate([row.standard_error for row in rows]),
        rhat=split_rhat(chains),
        center_losses=center_losses,
        traces=read_traces(folder, measured.chains),
        chains=measured.chains,
        diagnostics=diagnostics,
    )


def num_entries(study: ModelStudy) -> int:
    """Probe columns that are single losses; the means of samples that have several come after them."""
    return len(study.probe) * (study.num_positions or 1)


def entry_columns(study: ModelStudy) -> np.ndarray:
    """Weights of the probe columns in L: all losses alike, means of samples not at all."""
    weights = np.zeros(study.num_columns)
    weights[: num_entries(study)] = 1
    return weights


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


def write_tables(study: ModelStudy, response: UnitResponse, folder: Path) -> list[Path]:
    """One row a loss, and one a sample where samples have several losses; returns the files written."""
    metadata = unit_settings(study.config, response.unit) | {
        "observables": response.names,
        "units": UNITS,
        "sign": SIGN,
        "scale": SCALE,
        "num_training_losses": len(study.train) * (study.num_positions or 1),
        "num_chains": len(response.chains),
        "num_draws": response.traces["loss"].shape[1],
        "standard_error": "the larger of batch means inside chains and the spread between chains",
    }
    parts = [(f"susceptibility-{response.component}", entry_index(study), slice(0, num_entries(study)))]
    if study.num_positions is not None:
        name = f"susceptibility-{response.component}-samples"
        parts.append((name, sample_index(study), slice(num_entries(study), None)))
    files = []
    for name, index, part in parts:
        columns = dict(index)
        columns["center_loss"] = response.center_losses[part].astype(np.float32)
        columns["rhat"] = response.rhat[part].astype(np.float32)
        for k, observable in enumerate(response.names):
            columns[f"chi_{observable}"] = response.chi[k, part].astype(np.float32)
            columns[f"se_{observable}"] = response.standard_error[k, part].astype(np.float32)
        files.append(folder / f"{name}.parquet")
        write_parquet(files[-1], pa.table(columns), metadata)
    return files
