"""Stage ``report``: summary.json with every headline number and its interval, and report.html.

No model is opened: what an arm came to stands in its evaluation.json.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from patterning_dist.config import Config
from patterning_dist.measure.warnings import find_warnings
from patterning_dist.progress import Progress
from patterning_dist.report import build_report
from patterning_dist.report.differences import factors
from patterning_dist.report.headline import headline_table
from patterning_dist.report.predictions import predictions
from patterning_dist.report.words import Metrics
from patterning_dist.stages.arms import Arm, compare, contrasts, counterpart, describe_metrics, read_arms
from patterning_dist.stages.effects import add_ratios, head_ablations, oracle_shares, time_to_event
from patterning_dist.stages.frontier import frontier
from patterning_dist.stages.headline import VALIDATION, headline
from patterning_dist.stages.rounds import later_rounds
from patterning_dist.storage.files import read_result, write_json
from patterning_dist.storage.run import RunDirectory

_LONG = ("histogram", "conjugate_gradients", "fingerprint", "table_sha256")  # of a solution, and not for a summary


def report(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Write summary.json and report.html; returns both."""
    progress.start("writing the report", None)
    summary = _summarise(config, run)
    write_json(run.path / "summary.json", summary)
    _print_headline(summary, progress)
    return [run.path / "summary.json", build_report(run.path)]


def _print_headline(summary: dict[str, Any], progress: Progress) -> None:
    metrics = Metrics(summary["metrics"])
    table, reasons = headline_table(summary["headline"], metrics)
    for arm, *cells in table.rows:
        words = (f"{header} {cell}" for header, cell in zip(table.headers[1:], cells, strict=True) if cell != "–")
        progress.say(f"{arm}: {'; '.join(words)}")
    for line in [*factors(summary["contrasts"], summary["oracle_shares"], metrics), *reasons]:
        progress.say(line)


def _read(path: Path, asked_for: object) -> dict[str, Any]:
    """A JSON file of a stage; empty where the stage is not asked for."""
    return {} if asked_for is None else read_result(path)


def _summarise(config: Config, run: RunDirectory) -> dict[str, Any]:
    solution = _read(run.path / "weights" / "solution.json", config.solve)
    checked = _read(run.path / "check" / "response.json", config.check)
    windows = _read(run.path / "predict" / "response.json", config.predict)
    arms = read_arms(config, run.path)
    compared, unpaired = contrasts(arms)
    described = describe_metrics(config, run.path, arms)
    log_scaled = [name for name, metric in described.items() if metric.get("scale") == "log"]
    no_ratios = add_ratios(compared, arms, log_scaled)
    keys = ("weights", "strength", "rounds")
    arm_settings = {a.name: {key: getattr(a.settings, key) for key in keys} for a in arms}
    rounds = _rounds(config, run.path)
    found = predictions(solution, checked, windows, arm_settings)
    plain = {arm.name: counterpart(arm, arms, None) for arm in arms if arm.settings.weights is not None}
    realised = {arm.name: _realised(arm, base) for arm in arms if (base := plain.get(arm.name))}
    found["realised"] = {name: entries for name, entries in realised.items() if entries}
    stages, diagnostics = run.manifest["stages"], _diagnostics(run.path, checked, rounds)
    rows = headline(config, solution, windows, arm_settings, found)
    targets = dict.fromkeys(row["target"] for row in rows)
    return {
        "name": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": {
            stage: entry["seconds"] for stage, entry in stages.items() if stage != "report" and "seconds" in entry
        },
        "metrics": described,
        "headline": rows,
        "arms": {arm.name: arm_settings[arm.name] | arm.summary() for arm in arms},
        "contrasts": compared,
        "frontier": frontier(arms, compared, described, targets, solution.get("arms", {})),
        "oracle_shares": oracle_shares(config, arms, log_scaled),
        **found,
        "slopes": checked.get("slopes", {}),
        "weights": {
            arm: {k: entry[k] for k in ("strength", "effective_sample_share")}
            for arm, entry in solution.get("arms", {}).items()
            if "predicted_response" in entry
        },
        "rounds": {name: {k: v for k, v in entry.items() if k not in _LONG} for name, entry in rounds.items()},
        "validation": _read(run.path / "validate" / "summary.json", config.validation),
        "transition_steps": {arm.name: arm.transitions for arm in arms if arm.transitions is not None},
        "time_to_event": time_to_event(arms),
        "head_ablations": head_ablations(arms),
        "chains": {
            subject: {key: entry.get(key) for key in ("llc", "temperature", "temperature_stiff", "step_bias")}
            for subject, entry in diagnostics["subjects"].items()
        },
        "warnings": find_warnings(diagnostics, solution, checked, config, rounds.values()) + unpaired + no_ratios,
    }


def _realised(arm: Arm, base: Arm) -> dict[str, Any]:
    cost = {name: entry for name, entry in compare(arm, base, "metrics").items() if name == VALIDATION}
    return compare(arm, base, "observables") or cost


def _rounds(config: Config, folder: Path) -> dict[str, dict[str, Any]]:
    """Solutions of the rounds after the first, by round."""
    return {part.name: _read(folder / part.solution, part) for part in later_rounds(config)}


def _diagnostics(folder: Path, checked: dict[str, Any], rounds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of the sampled subjects, of those of stage check, and of those that the rounds were solved for by.

    Other strengths and rounds than these may have left folders when they were asked for.
    """
    found = read_result(folder / "response" / "diagnostics.json")
    of_check = (
        [f"check/{checked['subject']}@{strength}" for strength in ("+0", *checked["strengths"])] if checked else []
    )
    sampled = (entry["subject"] for entry in rounds.values() if entry["replicates"]["of"] == "chains")
    for subject in (*of_check, *sampled):
        file = folder / "sampling" / subject / "diagnostics.json"
        found["subjects"][subject] = read_result(file)["diagnostics"]
    return found
