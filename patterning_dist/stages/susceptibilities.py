"""What is made of the susceptibility tables of all components together: diagnostics, and modes over heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.response.modes import susceptibility_modes
from patterning_dist.sampling.study import Study
from patterning_dist.stages.unit_analysis import SIGN
from patterning_dist.storage.files import read_parquet, write_json, write_parquet
from patterning_dist.storage.run import RunDirectory

_TOP_TOKENS = 12


def write_response(study: Study, run: RunDirectory, diagnostics: dict[str, dict[str, Any]]) -> list[Path]:
    """Write diagnostics.json and the tables of modes; returns the files written.

    Args:
        study: of the run.
        run: holds the susceptibility tables.
        diagnostics: of every component.
    """
    content: dict[str, Any] = {"components": diagnostics}
    modes, mode_files = _write_modes(study, run, list(diagnostics))
    if modes:
        content["modes"] = modes
    write_json(run.path / "response" / "diagnostics.json", content)
    return [*mode_files, run.path / "response" / "diagnostics.json"]


def token_columns(study: Study) -> np.ndarray:
    """Weights of the probe columns in L: all tokens alike, sequence means not at all."""
    num_sequences, length = study.probe_tokens.shape
    return np.concatenate([np.ones(num_sequences * (length - 1)), np.zeros(num_sequences)])


def _write_modes(study: Study, run: RunDirectory, components: list[str]) -> tuple[dict[str, Any] | None, list[Path]]:
    """Singular modes of chi [head, token] of the first observable; nothing with fewer than two heads."""
    heads = [name for name in components if ".head." in name and "+" not in name]
    if len(heads) < 2:
        return None, []
    num_positions = study.probe_tokens.shape[1] - 1
    column = f"chi_{study.observable_names[0]}"
    tables = (read_parquet(run.path / "response" / f"susceptibility-{name}.parquet", [column])[0] for name in heads)
    matrix = np.stack([table[column].to_numpy().astype(np.float64) for table in tables])
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
