"""Stage ``report``: summary.json with every headline number and its interval, and report.html."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from patterning_dist.experiments.two_rules.config import ParenthesesConfig
from patterning_dist.experiments.two_rules.page.page import write_parentheses_page
from patterning_dist.experiments.two_rules.stages.summary import (
    read_diagnostics,
    summarise_arms,
    summarise_check,
    summarise_contrasts,
    summarise_llc,
    summarise_rounds,
)
from patterning_dist.progress import Progress
from patterning_dist.storage.files import read_parquet, write_json
from patterning_dist.storage.run import RunDirectory

_STRINGS_SHOWN = 12  # of the most up- and of the most down-weighted, of either label


def report(config: ParenthesesConfig, run: RunDirectory, progress: Progress) -> list[Path]:
    """Write summary.json and report.html; returns both."""
    progress.start("writing the report", None)
    solution = json.loads((run.path / "weights" / "solution.json").read_text())
    arms = summarise_arms(config, run.path)
    summary = {
        "name": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": {stage: entry["seconds"] for stage, entry in run.manifest["stages"].items() if "seconds" in entry},
        "arms": arms,
        "contrasts": summarise_contrasts(run.path),
        "rounds": summarise_rounds(run.path),
        "llc": summarise_llc(run.path),
        "check": summarise_check(config, run.path),
        "reliability": solution["reliability"],
        "weights": {
            arm: {k: v for k, v in entry.items() if k != "predicted"} for arm, entry in solution["arms"].items()
        },
        "strings": _strings(run.path),
        "warnings": _warnings(run.path, arms),
    }
    write_json(run.path / "summary.json", summary)
    write_parentheses_page(run.path / "report.html", summary)
    return [run.path / "summary.json", run.path / "report.html"]


def _strings(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The strings that the arm toward NESTED weighs most and least, of either label."""
    table, _ = read_parquet(folder / "weights" / "nested.parquet", ("text", "label", "score", "relative_weight"))
    scores, labels = table["score"].to_numpy(), table["label"].to_numpy()
    found = {}
    for label, words in ((1, "balanced"), (0, "unbalanced")):
        order = np.flatnonzero(labels == label)[np.argsort(scores[labels == label], kind="stable")]
        for side, ids in (("up", order[::-1][:_STRINGS_SHOWN]), ("down", order[:_STRINGS_SHOWN])):
            found[f"{words}_{side}"] = [
                {
                    "sample_id": int(i),
                    "text": table["text"][int(i)].as_py(),
                    "relative_weight": float(table["relative_weight"][int(i)].as_py()),
                }
                for i in ids
            ]
    return found


def _warnings(folder: Path, arms: dict[str, Any]) -> list[str]:
    """What speaks against the chains and the networks: a line for each way to fail, with the worst case of it."""
    entries: dict[str, dict[str, Any]] = {}
    for file in ("diagnostics.json", "rounds.json", "realised.json"):
        entries |= read_diagnostics(folder, file)
    found: dict[str, list[tuple[float, str]]] = {}
    for name, entry in entries.items():
        for finding in entry["findings"]:
            found.setdefault(finding["mode"], []).append((_severity(finding), f"{name}: {finding['message']}"))
    lines = []
    for cases in found.values():
        among = f"{len(cases)} of {len(entries)} sampled networks, the worst " if len(cases) > 1 else ""
        lines.append(among + max(cases)[1])
    for name, entry in entries.items():
        lines += [f"{name}: chain {e['chain']} is left out: {e['reason']}" for e in entry["excluded"]]
    return lines + [
        f"arm {arm}: {entry['num_imperfect_on_train']} of {entry['num_networks']} networks do not fit all training "
        f"strings, the worst {100 * entry['train_accuracy_min']:.2f} % of them"
        for arm, entry in arms.items()
        if entry["num_imperfect_on_train"]
    ]


def _severity(finding: dict[str, Any]) -> float:
    """Larger is worse among findings of one mode: a signal is too small, everything else too far from nought."""
    values = finding["evidence"].values()
    return -min(values) if finding["mode"] in ("too_little_signal", "too_cold") else max(map(abs, values))
