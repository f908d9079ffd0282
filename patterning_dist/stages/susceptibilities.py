"""From co-moments to the tables of the response folder: chi with errors, diagnostics, and modes over heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.files import write_json, write_parquet
from patterning_dist.models.components import select_component
from patterning_dist.response.diagnostics import split_rhat
from patterning_dist.response.ledger import read_chains
from patterning_dist.response.modes import susceptibility_modes
from patterning_dist.response.moments import CoMoments
from patterning_dist.response.susceptibility import Susceptibility, susceptibility
from patterning_dist.rundir import RunDirectory
from patterning_dist.sampling.study import Study
from patterning_dist.stages.chain_diagnostics import chain_diagnostics

SIGN = "chi = -Cov(phi, l_i - L): negative means that weighting sample i up lowers phi"
_TOP_TOKENS = 12


def write_susceptibilities(study: Study, run: RunDirectory) -> list[Path]:
    """Compute and write chi of every component; returns the files written.

    Raises:
        PatterningError: too few healthy chains, or baseline ``full`` without chains of ``everything``.
    """
    config, folder = study.config, run.path / "response"
    full = None
    if config.response.baseline == "full":
        full = read_chains(run.path / "sampling" / "everything")[0]
    diagnostics: dict[str, Any] = {"components": {}}
    outputs, found, model = [], {}, study.checkpoint()
    for component in config.sampling.components:
        chains, excluded = read_chains(run.path / "sampling" / component.name)
        measured = susceptibility(
            chains,
            loss_weights=token_columns(study),
            baseline=config.response.baseline,
            full=full,
            min_chains=config.sampling.min_chains,
            excluded=excluded,
        )
        found[component.name] = measured
        diagnostics["components"][component.name] = chain_diagnostics(
            run.path / "sampling" / component.name,
            study.observable_names,
            measured,
            num_entries=int(token_columns(study).sum()),
            inverse_temperature=study.posterior(component.name).inverse_temperature,
            num_coordinates=select_component(model, component.name).num_coordinates,
        )
        outputs += _write_tables(study, run, component.name, measured, chains)
    modes, mode_files = _write_modes(study, run, found)
    if modes:
        diagnostics["modes"] = modes
    write_json(folder / "diagnostics.json", diagnostics)
    return [*outputs, *mode_files, folder / "diagnostics.json"]


def token_columns(study: Study) -> np.ndarray:
    """Weights of the probe columns in L: all tokens alike, sequence means not at all."""
    num_sequences, length = study.probe_tokens.shape
    return np.concatenate([np.ones(num_sequences * (length - 1)), np.zeros(num_sequences)])


def _write_tables(
    study: Study, run: RunDirectory, component: str, measured: Susceptibility, chains: list[CoMoments]
) -> list[Path]:
    tokens = study.probe_tokens
    num_sequences, num_positions = tokens.shape[0], tokens.shape[1] - 1
    num_tokens = num_sequences * num_positions
    with np.load(run.path / "sampling" / component / "arrays.npz") as arrays:
        center_losses = arrays[f"{measured.chains[0]}/center_losses"]
    domains = study.probe_source.domains[study.probe_ids]
    posterior = study.posterior(component)
    metadata = {
        "component": component,
        "observables": study.observable_names,
        "units": "chi and se: nats times the unit of the observable; center_loss: nats",
        "sign": SIGN,
        "baseline": measured.baseline,
        "inverse_temperature": posterior.inverse_temperature,
        "localization": posterior.localization,
        "num_pool_tokens": study.num_pool_tokens,
        "num_chains": len(measured.chains),
        "num_draws": chains[0].num_recorded,
        "standard_error": "the larger of batch means inside chains and the spread between chains",
    }
    rhat = split_rhat(chains)

    def columns(part: slice) -> dict[str, np.ndarray]:
        result = {"center_loss": center_losses[part].astype(np.float32), "rhat": rhat[part].astype(np.float32)}
        for k, name in enumerate(study.observable_names):
            result[f"chi_{name}"] = measured.chi[k, part].astype(np.float32)
            result[f"se_{name}"] = measured.standard_error[k, part].astype(np.float32)
        return result

    position = np.tile(np.arange(1, num_positions + 1, dtype=np.int16), num_sequences)
    per_token = {
        "sequence_id": np.repeat(study.probe_ids, num_positions),
        "position": position,
        "token": tokens[:, 1:].ravel().astype(np.int32),
        "domain": np.repeat(domains, num_positions),
    }
    token_file = run.path / "response" / f"susceptibility-{component}.parquet"
    write_parquet(token_file, pa.table(per_token | columns(slice(0, num_tokens))), metadata)
    sequence_file = run.path / "response" / f"susceptibility-{component}-sequences.parquet"
    per_sequence = {"sequence_id": study.probe_ids, "domain": domains}
    write_parquet(sequence_file, pa.table(per_sequence | columns(slice(num_tokens, None))), metadata)
    return [token_file, sequence_file]


def _write_modes(
    study: Study, run: RunDirectory, found: dict[str, Susceptibility]
) -> tuple[dict[str, Any] | None, list[Path]]:
    """Singular modes of chi [head, token] of the first observable; nothing with fewer than two heads."""
    heads = [name for name in found if ".head." in name and "+" not in name]
    if len(heads) < 2:
        return None, []
    num_sequences, num_positions = study.probe_tokens.shape[0], study.probe_tokens.shape[1] - 1
    num_tokens = num_sequences * num_positions
    matrix = np.stack([found[name].chi[0, :num_tokens] for name in heads])
    modes = susceptibility_modes(matrix, rows="standardized")
    kept = min(study.config.response.num_modes, len(heads))
    table = {"mode": np.arange(kept, dtype=np.int32), "singular_value": modes.singular_values[:kept]}
    table |= {head: modes.left[i, :kept] for i, head in enumerate(heads)}
    metadata = {
        "observable": study.observable_names[0],
        "rows": "heads, centred and standardised over tokens",
        "sign": SIGN,
    }
    mode_file, token_file = (run.path / "response" / name for name in ("modes.parquet", "mode-tokens.parquet"))
    write_parquet(mode_file, pa.table(table), metadata)
    rows = []
    for mode in range(kept):
        order = np.argsort(modes.right[mode])
        for sign, chosen in ((-1, order[:_TOP_TOKENS]), (1, order[::-1][:_TOP_TOKENS])):
            for rank, column in enumerate(chosen):
                sequence, position = divmod(int(column), num_positions)
                sequence_id = int(study.probe_ids[sequence])
                rows.append((mode, sign, rank, sequence_id, position + 1, float(modes.right[mode, column])))
    names = ("mode", "sign", "rank", "sequence_id", "position", "score")
    write_parquet(token_file, pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), metadata)
    summary = {
        "components": heads,
        "observable": study.observable_names[0],
        "singular_values": modes.singular_values,
        "explained_variance": modes.explained_variance,
    }
    return summary, [mode_file, token_file]
