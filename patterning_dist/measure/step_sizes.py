"""Subjects sampled once more at half the step size, and their answers at step size 0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.measure.results import SubjectResponse, samples_table_name, table_name
from patterning_dist.measure.subjects import HALF_STEP, Subjects
from patterning_dist.response.llc import TraceMean, trace_mean
from patterning_dist.response.step_extrapolation import StepExtrapolation, step_extrapolated
from patterning_dist.storage.files import read_parquet, write_parquet
from patterning_dist.storage.run import RunDirectory

EXTRAPOLATED = "~extrapolated"  # after a subject's name: the table of chi at step size 0


def extrapolate_steps(
    run: RunDirectory, subjects: Subjects, responses: Sequence[SubjectResponse]
) -> tuple[dict[str, dict[str, Any]], list[Path]]:
    """What diagnostics say of step size 0, by subject, and the tables of chi there; of subjects with a twin at eps / 2.

    LLC and means of observables with their biases, and per row of chi what the step makes it off by: 2 (chi(eps) -
    chi(eps/2)), root mean square over the probe with the part of the noise taken off, beside the error of chi(eps).
    """
    by_name, found, files = {response.name: response for response in responses}, {}, []
    for coarse in responses:
        fine = by_name.get(coarse.name + HALF_STEP)
        if fine is None:
            continue
        scales = {"loss": subjects.posterior(coarse.name).inverse_temperature}
        means = {
            "LLC" if name == "loss" else name: _described(
                step_extrapolated(*(trace_mean(scales.get(name, 1.0) * one.traces[name]) for one in (coarse, fine)))
            )
            for name in coarse.traces
        }
        chi = {
            row: _size(coarse.chi[i] - fine.chi[i], coarse.standard_error[i], fine.standard_error[i])
            for i, row in enumerate(coarse.rows)
        }
        found[coarse.name] = {"extrapolated": {"means": means, "chi": chi}}
        for name in (table_name, samples_table_name):
            paths = [run.path / name(subject) for subject in (coarse.name, fine.name, coarse.name + EXTRAPOLATED)]
            if paths[0].exists():
                files.append(_write_table(paths, coarse.rows))
    return found, files


def _described(found: StepExtrapolation[TraceMean]) -> dict[str, Any]:
    parts = {"value": found.extrapolated, "bias": found.bias, "full_step": found.coarse, "half_step": found.fine}
    entry = {
        name: {"value": part.value, "standard_error": part.standard_error, "interval": part.interval()}
        for name, part in parts.items()
    }
    verdict = {"bias_ratio": float(found.bias_ratio), "is_biased": bool(found.is_biased)}
    return entry.pop("value") | entry | verdict


def _size(bias: np.ndarray, coarse: np.ndarray, fine: np.ndarray) -> dict[str, float]:
    excess = np.mean(bias.astype(float) ** 2 - coarse.astype(float) ** 2 - fine.astype(float) ** 2)
    return {"bias": 2 * float(np.sqrt(max(excess, 0.0))), "standard_error": float(np.sqrt(np.mean(coarse**2.0)))}


def _write_table(paths: Sequence[Path], rows: Sequence[str]) -> Path:
    """chi and its error at step size 0, with chi(eps) - chi(eps/2), which half the step is off by, and its error."""
    wanted = ["rhat", *(f"{kind}_{row}" for row in rows for kind in ("chi", "se"))]
    (coarse, header), (fine, _) = (read_parquet(path, wanted) for path in paths[:2])
    ours, theirs = ({name: table[name].to_numpy() for name in wanted} for table in (coarse, fine))
    columns: dict[str, Any] = {name: coarse[name] for name in coarse.column_names}
    columns["rhat"] = np.fmax(ours["rhat"], theirs["rhat"])
    for row in rows:
        chi, half, error, half_error = (values[f"{k}_{row}"] for k in ("chi", "se") for values in (ours, theirs))
        columns |= {f"chi_{row}": 2 * half - chi, f"se_{row}": np.hypot(2 * half_error, error)}
        columns |= {f"bias_{row}": chi - half, f"se_bias_{row}": np.hypot(error, half_error)}
    steps = [header["step_size"], header["step_size"] / 2]
    write_parquet(paths[2], pa.table(columns), header | {"step_size": 0.0, "extrapolated_from": steps})
    return paths[2]
