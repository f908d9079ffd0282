"""Stage ``check``: the response under the solved weights, measured by chains that are coupled to the unweighted ones.

Chains on L_rho and on L with the same noise and the same minibatches move together, so that the difference of an
observable over their draws,

    d<phi> = mean_t [ phi(w_t^rho) - phi(w_t) ] ,    rho = 1 + s h ,

has a small part of the Monte-Carlo noise of either. It measures on the posterior, at any strength s, what the linear
response (n_beta / n) chi s h predicts, without a retraining.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from patterning_dist.aggregation.files import read_records, read_traces
from patterning_dist.config import Config
from patterning_dist.measure.measure import measure
from patterning_dist.progress import Progress
from patterning_dist.response.llc import trace_mean
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.stages.sample import open_subjects
from patterning_dist.storage.files import write_json
from patterning_dist.storage.run import RunDirectory

STAGE = "check"
RESULT = "check/response.json"


def check(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Run the weighted chains of every strength, and compare their draws with the unweighted ones.

    Raises:
        PatterningError: fewer healthy chains than sampling.min_chains.
    """
    assert config.check is not None and config.solve is not None
    device = resolve_device(config.device)
    opener = open_subjects(config, run.place, device)
    solution = json.loads((run.path / "weights" / "solution.json").read_text())
    base = solution["subject"]
    table = f"weights/{config.check.weights}.parquet"
    names = {strength: f"check/{base}@{strength:+g}" for strength in (0.0, *config.check.strengths)}
    subjects = {name: replace(opener.by_name[base], weights=table, strength=s) for s, name in names.items()}
    weighted = replace(
        opener,
        by_name=subjects,
        files=(*opener.files, table),
        gradients_of=frozenset(),
        thin=None,
        part="predicted",  # the weights were solved for others
    )
    measured = measure(run, config.name, STAGE, weighted, device, progress)
    linear = solution["arms"][config.check.weights]["predicted_response"]
    found = {
        f"{strength:+g}": _differences(run, names[0.0], names[strength], strength, linear)
        for strength in config.check.strengths
    }
    write_json(run.path / RESULT, {"subject": base, "weights": config.check.weights, "strengths": found})
    return [*measured.files, run.path / RESULT]


def _differences(
    run: RunDirectory, base: str, weighted: str, strength: float, linear: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Observable -> mean difference over draws and chains with its error, and what linear response predicts of it."""
    folders = [run.path / "sampling" / name for name in (base, weighted)]
    chains = sorted(set.intersection(*({r.chain for r in read_records(folder) if r.healthy} for folder in folders)))
    before, after = (read_traces(folder, chains) for folder in folders)
    found: dict[str, dict[str, Any]] = {}
    for name in before:
        measured = trace_mean(after[name] - before[name])
        found[name] = {
            "value": measured.value,
            "standard_error": measured.standard_error,
            "interval": [float(bound) for bound in measured.interval()],
        }
        if name in linear:
            found[name]["predicted"] = strength * float(np.asarray(linear[name]["value"]))
    return found
