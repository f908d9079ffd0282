"""Stage ``report``: summary.json with every headline number and its interval, and report.html."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors.torch import load_file
from scipy.stats import t as student_t

from patterning_dist.config import Config
from patterning_dist.models.attention import build_model
from patterning_dist.progress import Progress
from patterning_dist.report import build_report
from patterning_dist.sampling.study import Study
from patterning_dist.stages.warnings import find_warnings
from patterning_dist.storage.files import write_json
from patterning_dist.storage.run import STAGES, RunDirectory
from patterning_dist.training.metrics import batched_losses

# Metrics of an arm in the summary, with their unit.
METRICS = {
    "prefix_matching": "probability",
    "induction_gap": "nats",
    "repeated_gap": "nats",
    "in_context_gap": "nats",
    "induction_loss": "nats",
    "validation_loss": "nats",
}
# An induction head is there once the largest prefix-matching score has passed this.
TRANSITION = 0.1
_CONTRASTS_FEATURED = ("plus-base", "plus-permuted", "minus-base")
_CONTRASTS = (("plus", "base"), ("plus", "permuted"), ("minus", "base"), ("minus", "permuted"), ("permuted", "base"))


def report(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Write summary.json and report.html; returns both."""
    arms = config.retrain.arms
    progress.start("reading the arms", len(arms))
    finals: dict[str, dict[str, np.ndarray]] = {}
    observables: dict[str, dict[str, np.ndarray]] = {}
    transitions: dict[str, list[int | None]] = {}
    for done, arm in enumerate(arms, start=1):
        curves = [
            pq.read_table(run.path / "retrain" / arm / f"seed-{seed}" / "metrics.parquet")
            for seed in config.retrain.seeds
        ]
        finals[arm] = {metric: np.array([c[metric][-1].as_py() for c in curves]) for metric in METRICS}
        observables[arm] = _observables(config, run, arm)
        transitions[arm] = [_transition(c["step"].to_numpy(), c["prefix_matching"].to_numpy()) for c in curves]
        progress.update(done)
    summary = _summarise(config, run, finals, observables, transitions)
    write_json(run.path / "summary.json", summary)
    return [run.path / "summary.json", build_report(run.path)]


def interval(values: np.ndarray) -> list[float] | None:
    """95 % interval of the mean over seeds, Student t with seeds - 1 degrees of freedom; None with one seed."""
    if len(values) < 2:
        return None
    width = student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return [float(values.mean() - width), float(values.mean() + width)]


def _transition(steps: np.ndarray, scores: np.ndarray) -> int | None:
    passed = np.flatnonzero(scores > TRANSITION)
    return int(steps[passed[0]]) if len(passed) else None


def _observables(config: Config, run: RunDirectory, arm: str) -> dict[str, np.ndarray]:
    """The split losses themselves, on every seed's final weights: what the prediction was about."""
    study = Study(config, run.path, "cpu")
    values = []
    for seed in config.retrain.seeds:
        model = build_model(config.model, study.pool.vocabulary_size, study.pool.context_length)
        model.load_state_dict(load_file(run.path / "retrain" / arm / f"seed-{seed}" / "model.safetensors"))
        losses = batched_losses(model, study.splits.tokens).double()
        values.append((study.splits.coefficients.double() * losses).sum(dim=(1, 2)).numpy())
    return dict(zip(study.splits.names, np.array(values).T, strict=True))


def _entries(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: _entry(a[name] - b[name]) for name in a}


def _entry(values: np.ndarray) -> dict[str, Any]:
    return {"value": values.mean(), "interval": interval(values), "per_seed": values}


def _summarise(
    config: Config,
    run: RunDirectory,
    finals: dict[str, dict[str, np.ndarray]],
    observables: dict[str, dict[str, np.ndarray]],
    transitions: dict[str, list[int | None]],
) -> dict[str, Any]:
    solution = json.loads((run.path / "weights" / "solution.json").read_text())
    diagnostics = json.loads((run.path / "response" / "diagnostics.json").read_text())
    pairs = [(a, b) for a, b in _CONTRASTS if a in finals and b in finals]
    contrasts = {f"{a}-{b}": {m: _entry(finals[a][m] - finals[b][m]) for m in finals[a]} for a, b in pairs}
    realised = {a: _entries(observables[a], observables["base"]) for a, b in pairs if b == "base"}
    # A target that is no metric of training is compared all the same.
    for a, b in pairs:
        contrasts[f"{a}-{b}"] = _entries(observables[a], observables[b]) | contrasts[f"{a}-{b}"]
    weighted = {arm: entry for arm, entry in solution["arms"].items() if "predicted_response" in entry}
    stages = run.manifest["stages"]
    return {
        "name": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": {stage: stages[stage]["seconds"] for stage in STAGES if "seconds" in stages.get(stage, {})},
        "headline": _headline(contrasts, weighted, solution.get("estimator_agreement", {})),
        "arms": {
            arm: {"seeds": config.retrain.seeds} | {m: _entry(v) for m, v in values.items()}
            for arm, values in finals.items()
        },
        "contrasts": contrasts,
        "predicted": {arm: entry["predicted_response"] for arm, entry in weighted.items()},
        "realised": realised,
        "weights": {
            arm: {k: entry[k] for k in ("strength", "effective_sample_share")} for arm, entry in weighted.items()
        },
        "transition_steps": transitions,
        "warnings": find_warnings(diagnostics, solution, config),
    }


def _headline(
    contrasts: dict[str, dict[str, Any]], weighted: dict[str, Any], agreements: dict[str, Any]
) -> list[dict[str, Any]]:
    rows = []

    def add(name: str, entry: dict[str, Any], unit: str, what: str, featured: bool) -> None:
        row = {"name": name, "value": entry["value"], "interval": entry["interval"], "unit": unit, "what": what}
        rows.append(row | {"featured": featured})

    # Featured: what a reader looks for first, the targeted observables and the circuit itself.
    targeted = {name for entry in weighted.values() for name, value in entry["target"].items() if value}
    for pair, entries in contrasts.items():
        arms = pair.replace("-", " against ")
        what = f"{arms} at the last step; mean and interval over seeds, paired; held-out sequences fixed"
        for metric, entry in entries.items():
            featured = pair in _CONTRASTS_FEATURED and metric in targeted | {"prefix_matching"}
            add(f"{pair} {metric}", entry, METRICS.get(metric, "nats"), what, featured)
    for arm, solved in weighted.items():
        for kind in ("predicted_response", "cross_fitted_response"):
            what = "linear response at the checkpoint, error over chains"
            for name, entry in solved[kind].items():
                add(f"{arm} {kind} {name}", entry, "nats", what, kind.startswith("cross") and name in targeted)
    for name, agreement in agreements.items():
        what = "plain covariance against response direction on the probe"
        for level in ("tokens", "sequences"):
            entry = {"value": agreement[f"correlation_{level}"], "interval": agreement[f"interval_{level}"]}
            add(f"estimator agreement {name} {level}", entry, "correlation", what, False)
    return rows
