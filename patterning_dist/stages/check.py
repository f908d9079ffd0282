"""Stage ``check``: the response under the solved weights, measured by chains that are coupled to the unweighted ones.

Chains on L_rho and on L with the same noise and the same minibatches move together, so that the difference of an
observable over their draws,

    d<phi> = mean_t [ phi(w_t^rho) - phi(w_t) ] ,    rho = 1 + s h ,

has a small part of the Monte-Carlo noise of either. It measures on the posterior, at any strength s, what the linear
response (n_beta / n) chi s h predicts, without a retraining; likewise the LLC and the free energy, see
``response.coupled``. Two strengths s and -s give the slope at 0, which is what chi itself says, free of second order.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from patterning_dist.aggregation.files import read_records, read_traces
from patterning_dist.config import Config, LlcConfig
from patterning_dist.config.sampling import ControlledConfig
from patterning_dist.measure.measure import measure
from patterning_dist.measure.results import table_name
from patterning_dist.measure.subjects import Subjects
from patterning_dist.progress import Progress
from patterning_dist.response.coupled import (
    Linear,
    coupled_mean,
    free_energy_slope,
    integrated,
    measured,
    smallest_pair,
    symmetric_slope,
    verdict,
)
from patterning_dist.response.moments import Floats
from patterning_dist.response.prediction import predicted_response_with_error
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.stages.sample import open_subjects
from patterning_dist.stages.scores import plain_rows
from patterning_dist.storage.files import read_parquet, read_result, write_json
from patterning_dist.storage.run import RunDirectory

STAGE = "check"
RESULT = "check/response.json"
Traces = dict[str, Floats]


def check(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Run the weighted chains of every strength, and compare their draws with the unweighted ones.

    Raises:
        PatterningError: a strength takes a weight below 0, said before any chain is run; or there are fewer healthy
            chains than sampling.min_chains.
    """
    assert config.check is not None and config.solve is not None
    device = resolve_device(config.device)
    opener = open_subjects(config, run.location, device)
    solution = read_result(run.path / "weights" / "solution.json")
    base = solution["subject"]
    table = f"weights/{config.check.weights}.parquet"
    names = {strength: f"check/{base}@{strength:+g}" for strength in (0.0, *config.check.strengths)}
    by_name = {name: replace(opener.by_name[base], weights=table, strength=s) for s, name in names.items()}
    # The weights were solved for others of the held-out samples.
    weighted = opener.weighted(by_name, table, gradients_of=frozenset(), part="predicted")
    subjects = weighted("cpu", Ranks())
    for name in by_name:
        subjects.loss_weights(name)
    done = measure(run, config.name, STAGE, weighted, device, progress)
    traces = read_coupled(run.path, names)
    found, slopes = responses(config, run, subjects, names, traces)
    for name, entry in slopes.items():
        words = f"{entry['value']:+.3g} ± {entry['standard_error']:.1g}"
        predicted = f", {entry['predicted']:+.3g} predicted: {entry['verdict']}" if "verdict" in entry else ""
        progress.say(f"{STAGE}: slope of {name} at 0 {words}{predicted}")
    result = {"subject": base, "weights": config.check.weights, "strengths": found, "slopes": slopes}
    write_json(run.path / RESULT, result)
    return [*done.files, run.path / RESULT]


def read_coupled(directory: Path, names: dict[float, str]) -> dict[float, Traces]:
    """Traces of the chains that are healthy at all strengths, strength -> name -> [chain, draw]; 0 is one of them.

    Args:
        directory: of the run.
        names: strength -> subject, of the same noise and minibatches.
    """
    folders = {strength: directory / "sampling" / name for strength, name in names.items()}
    healthy = [{record.chain for record in read_records(f) if record.healthy} for f in folders.values()]
    chains = sorted(set.intersection(*healthy))
    return {strength: read_traces(folder, chains) for strength, folder in folders.items()}


def responses(
    config: Config, run: RunDirectory, subjects: Subjects, names: dict[float, str], traces: dict[float, Traces]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Strength -> row -> what was measured of it and what linear response says; and row -> the slope at 0, likewise."""
    changes, exact = _changes(config, run, subjects, names, traces)
    linear = _linear(config, run, subjects, names[0.0])
    found: dict[str, dict[str, Any]] = {}
    for strength, rows in changes.items():
        found[f"{strength:+g}"] = {
            name: measured(coupled_mean(trace))
            | ({"predicted": strength * linear[name].value} if name in linear else {})
            for name, trace in rows.items()
        }
    slopes: dict[str, dict[str, Any]] = {}
    if (pair := smallest_pair(list(changes))) is not None:
        for name, above in changes[pair].items():
            trace = symmetric_slope(above, changes[-pair][name], pair)
            slope = coupled_mean(trace)
            slopes[name] = measured(slope) | {"strength": pair}
            if name in linear:
                slopes[name] |= verdict(slope, linear[name], trace.mean(axis=1), exact.get(name, 0.0))
    return found, slopes


def _changes(
    config: Config, run: RunDirectory, subjects: Subjects, names: dict[float, str], traces: dict[float, Traces]
) -> tuple[dict[float, Traces], dict[str, float]]:
    """Strength -> row -> its change from strength 0, draw by draw [chain, draw]; and the exact parts of slopes."""
    plain, weighted = traces[0.0], {s: trace for s, trace in traces.items() if s != 0}
    changes = {s: {name: trace[name] - plain[name] for name in plain} for s, trace in weighted.items()}
    n_beta = subjects.posterior(names[0.0]).inverse_temperature
    rho, exact = _table(config, subjects), dict[str, float]()
    for quantity in config.sampling.posterior_quantities:
        if isinstance(quantity, ControlledConfig):
            for trace in changes.values():
                trace[quantity.name] = trace[quantity.of]
            continue
        if isinstance(quantity, LlcConfig):
            for trace in changes.values():
                trace[quantity.name] = n_beta * trace["loss"]
            continue
        center = read_parquet(run.path / table_name(names[0.0]), ["center_loss"])[0]["center_loss"].to_numpy()
        at_center = float((rho - rho.mean()) @ center.astype(float) / len(rho))
        if config.solve is not None and config.solve.scores == "first_moment":
            at_center = 0.0  # these scores are of F - n_beta L_rho(w*): of the landscape around w*, not its height
        exact[quantity.name] = n_beta * at_center
        loss = next(o.name for o in config.sampling.observables if o.kind == "component_loss")
        slopes = {
            s: free_energy_slope(trace["loss"], trace[loss], s, n_beta, at_center, 1 + s * (rho.mean() - 1))
            for s, trace in weighted.items()
        }
        for strength, trace in changes.items():
            trace[quantity.name] = integrated(slopes, strength)
    return changes, exact


def _linear(config: Config, run: RunDirectory, subjects: Subjects, base: str) -> dict[str, Linear]:
    """Row -> linear response to h: what solve promised of a target, else chi of the probe from the chains at 0."""
    assert config.check is not None
    rows = plain_rows(run.path, subjects, base, config.sampling.posterior_quantities)
    n_beta = subjects.posterior(base).inverse_temperature
    plain = predicted_response_with_error(np.stack(list(rows.values()), axis=1), _table(config, subjects), n_beta)
    errors, widths = plain.standard_error.tolist(), (np.ptp(plain.interval, axis=1) / 2).tolist()
    found = {
        name: Linear(value, errors[k], widths[k], plain.per_chain[:, k])
        for k, (name, value) in enumerate(zip(rows, plain.value.tolist(), strict=True))
    }
    solution = read_result(run.path / "weights" / "solution.json")
    for name, entry in solution["arms"][config.check.weights]["predicted_response"].items():
        value, error, low, high = (
            float(x) for x in np.array([entry["value"], entry["standard_error"], *entry["interval"]], float)
        )
        found[name] = Linear(value, error, (high - low) / 2)
    return found


def _table(config: Config, subjects: Subjects) -> Floats:
    """rho of the probe entries that count, at strength 1 [entry]."""
    assert config.check is not None
    file = subjects.directory / f"weights/{config.check.weights}.parquet"
    rho = subjects.task.read_weights(file, 1.0)[subjects.probe.ids].astype(float)
    return subjects.entries_of("probe", np.arange(len(rho)), rho[None])[0]
