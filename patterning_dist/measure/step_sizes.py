"""Subjects sampled once more at half the step size, and their answers at step size 0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.measure.diagnostics import estimate
from patterning_dist.measure.results import SubjectResponse, samples_table_name, table_name
from patterning_dist.measure.subject import HALF_STEP
from patterning_dist.measure.subjects import Subjects
from patterning_dist.response.llc import trace_mean
from patterning_dist.response.step_extrapolation import step_extrapolated
from patterning_dist.storage.files import read_parquet, write_parquet
from patterning_dist.storage.run import RunDirectory

EXTRAPOLATED = "~extrapolated"  # after a subject's name: the tables of chi at step size 0


def extrapolate_steps(
    run: RunDirectory, subjects: Subjects, responses: Sequence[SubjectResponse]
) -> tuple[dict[str, dict[str, Any]], list[Path]]:
    """What diagnostics say of step size 0, by subject, and the tables of chi there; of subjects sampled at eps / 2 too.

    LLC and means of observables; and of every row of chi the difference between eps and eps / 2, root mean square over
    the probe with the part of the noise taken off.
    """
    by_name, found, files = {response.name: response for response in responses}, {}, []
    for coarse in responses:
        fine = by_name.get(coarse.name + HALF_STEP)
        if fine is None:
            continue
        n_beta = subjects.posterior(coarse.name).inverse_temperature
        traces = {"LLC" if n == "loss" else n: (n_beta if n == "loss" else 1.0, n) for n in coarse.traces}
        entry = {name: _mean(*(scale * one.traces[n] for one in (coarse, fine))) for name, (scale, n) in traces.items()}
        for row, chi, half, *errors in zip(
            coarse.rows, coarse.chi, fine.chi, coarse.standard_error, fine.standard_error, strict=True
        ):
            squares = [float(np.mean(values.astype(float) ** 2)) for values in (chi - half, *errors)]
            bias = float(np.sqrt(max(squares[0] - squares[1] - squares[2], 0.0)))
            ratio = 2 * bias / np.sqrt(squares[1]) if squares[1] else np.nan
            entry[f"chi of {row}"] = {"bias": {"value": bias}, "bias_ratio": float(ratio)}
        found[coarse.name] = {"extrapolated": entry}
        for table in (table_name, samples_table_name):
            paths = [run.path / table(subject) for subject in (coarse.name, fine.name, coarse.name + EXTRAPOLATED)]
            if paths[0].exists():
                _write_table(paths, coarse.rows)
                files.append(paths[2])
    return found, files


def _mean(coarse: np.ndarray, fine: np.ndarray) -> dict[str, Any]:
    found = step_extrapolated(trace_mean(coarse), trace_mean(fine))
    parts = {"bias": found.bias, "full_step": found.coarse, "half_step": found.fine}
    verdict = {"bias_ratio": float(found.bias_ratio), "is_biased": bool(found.is_biased)}
    return estimate(found.extrapolated) | {name: estimate(part) for name, part in parts.items()} | verdict


def _write_table(paths: Sequence[Path], rows: Sequence[str]) -> None:
    """chi and its error at step size 0, and chi(eps) - chi(eps/2) with its own."""
    (coarse, header), (fine, _) = (read_parquet(path, ["rhat"]) for path in paths[:2])
    columns: dict[str, Any] = {name: coarse[name] for name in coarse.column_names}
    columns["rhat"] = np.fmax(coarse["rhat"].to_numpy(), fine["rhat"].to_numpy())
    for row in rows:
        chi, half, error, half_error = (t[f"{k}_{row}"].to_numpy() for k in ("chi", "se") for t in (coarse, fine))
        columns |= {f"chi_{row}": 2 * half - chi, f"se_{row}": np.hypot(2 * half_error, error)}
        columns |= {f"bias_{row}": chi - half, f"se_bias_{row}": np.hypot(error, half_error)}
    steps = [header["step_size"], header["step_size"] / 2]
    write_parquet(paths[2], pa.table(columns), header | {"step_size": 0.0, "extrapolated_from": steps})
