"""Stage ``report``: summary.json with every headline number and its interval, and report.html.

No model is opened: what an arm came to stands in its evaluation.json.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from patterning_dist.config import Config
from patterning_dist.measure.warnings import find_warnings
from patterning_dist.progress import Progress
from patterning_dist.report import build_report
from patterning_dist.report.predictions import predictions
from patterning_dist.stages.arms import compare, contrasts, describe_metrics, read_arms
from patterning_dist.stages.rounds import later_rounds
from patterning_dist.storage.files import write_json
from patterning_dist.storage.run import RunDirectory

_LONG = ("histogram", "conjugate_gradients", "fingerprint", "table_sha256")  # of a solution, and not for a summary


def report(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Write summary.json and report.html; returns both."""
    progress.start("writing the report", None)
    write_json(run.path / "summary.json", _summarise(config, run))
    return [run.path / "summary.json", build_report(run.path)]


def _read(path: Path, asked_for: object) -> dict[str, Any]:
    """A JSON file of a stage; empty where the stage is not asked for."""
    return {} if asked_for is None else json.loads(path.read_text(encoding="utf-8"))


def _summarise(config: Config, run: RunDirectory) -> dict[str, Any]:
    solution = _read(run.path / "weights" / "solution.json", config.solve)
    checked = _read(run.path / "check" / "response.json", config.check)
    windows = _read(run.path / "predict" / "response.json", config.predict)
    arms = read_arms(config, run.path)
    compared, unpaired = contrasts(arms)
    described = describe_metrics(config, run.path, arms)
    base = next((arm for arm in arms if arm.settings.weights is None), None)
    realised = {a.name: compare(a, base, "observables") for a in arms if base and a is not base}
    keys = ("weights", "strength", "rounds")
    told = {a.name: {key: getattr(a.settings, key) for key in keys} for a in arms}
    rounds = _rounds(config, run.path)
    predicted = predictions(solution, checked, windows, told)
    stages, diagnostics = run.manifest["stages"], _diagnostics(run.path, rounds)
    return {
        "name": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": {
            stage: entry["seconds"] for stage, entry in stages.items() if stage != "report" and "seconds" in entry
        },
        "metrics": described,
        "headline": _headline(compared, predicted, solution, described, [a.name for a in arms if a.is_weighted]),
        "arms": {arm.name: told[arm.name] | arm.summary() for arm in arms},
        "contrasts": compared,
        **predicted,
        "realised": {name: entries for name, entries in realised.items() if entries},
        "weights": {
            arm: {k: entry[k] for k in ("strength", "effective_sample_share")}
            for arm, entry in solution.get("arms", {}).items()
            if "predicted_response" in entry
        },
        "rounds": {name: {k: v for k, v in entry.items() if k not in _LONG} for name, entry in rounds.items()},
        "transition_steps": {arm.name: arm.transitions for arm in arms if arm.transitions is not None},
        "chains": {
            subject: {key: entry.get(key) for key in ("llc", "temperature", "temperature_stiff", "step_bias")}
            for subject, entry in diagnostics["subjects"].items()
        },
        "warnings": find_warnings(diagnostics, solution, checked, config, rounds.values()) + unpaired,
    }


def _rounds(config: Config, folder: Path) -> dict[str, dict[str, Any]]:
    """Solutions of the rounds after the first, by round."""
    return {part.name: _read(folder / part.solution, part) for part in later_rounds(config)}


def _diagnostics(folder: Path, rounds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of the sampled subjects, of those of stage check, and of those that the rounds were solved for by."""
    found = json.loads((folder / "response" / "diagnostics.json").read_text(encoding="utf-8"))
    sampling = folder / "sampling"
    for file in sorted((sampling / "check").rglob("diagnostics.json")):
        found["subjects"][file.parent.relative_to(sampling).as_posix()] = json.loads(file.read_text())["diagnostics"]
    for subject in (entry["subject"] for entry in rounds.values()):
        found["subjects"][subject] = json.loads((sampling / subject / "diagnostics.json").read_text())["diagnostics"]
    return found


def _headline(
    compared: dict[str, Any],
    predicted: dict[str, Any],
    solution: dict[str, Any],
    described: dict[str, dict[str, str]],
    weighted: list[str],
) -> list[dict[str, Any]]:
    """Rows of name, value and interval; featured is what a reader looks for first, the targeted observables."""
    rows: list[dict[str, Any]] = []

    def add(name: str, entry: dict[str, Any], unit: str, what: str, featured: bool) -> None:
        row = {"name": name, "value": entry["value"], "interval": entry["interval"], "unit": unit, "what": what}
        rows.append(row | {"featured": featured})

    targets = (entry.get("target", {}) for entry in solution.get("arms", {}).values())
    targeted = {name for target in targets for name, value in target.items() if value}

    def unit(name: str) -> str:
        return described.get(name, {}).get("unit", "")

    for arm, against in compared.items():
        for other, entries in against.items():
            what = (
                f"{arm} against {other} at the last step; mean and interval over seeds, paired; held-out samples fixed"
            )
            for metric, entry in entries.items():
                add(f"{arm}-{other} {metric}", entry, unit(metric), what, metric in targeted and arm in weighted)
    sources = {
        "predicted": "linear response at the checkpoint, error over chains",
        "cross_fitted": "linear response at the checkpoint on the chains that were not solved on",
        "checked": "chains under the weights minus coupled chains without, error over draws and chains",
        "window": "the training's window walked under the weights and under equal ones, on other held-out samples",
    }
    for kind, what in sources.items():
        for arm, entries in predicted[kind].items():
            for name, entry in entries.items():
                featured = kind != "predicted" and name in targeted
                add(f"{arm} {kind.replace('_', '-')} {name}", entry, unit(name), what, featured)
    for name, agreement in solution.get("estimator_agreement", {}).items():
        what = "plain covariance against response direction on the probe"
        for level in ("entries", "samples"):
            if f"correlation_{level}" in agreement:
                entry = {"value": agreement[f"correlation_{level}"], "interval": agreement[f"interval_{level}"]}
                add(f"estimator agreement {name} {level}", entry, "correlation", what, False)
    return rows
