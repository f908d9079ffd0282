"""The baseline's training and the record of the run: cost, versions, seeds, configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from patterning_dist.report.blocks import Figures, Note, Section, Table
from patterning_dist.report.figures import bars, curves, figure, grid
from patterning_dist.report.reading import Run, column
from patterning_dist.report.words import Metrics, duration, number

HEAD_COLUMN = re.compile(r"(previous_token|prefix_matching)_(\d+)_(\d+)")


def baseline(section: Section, run: Run, metrics: Metrics) -> None:
    """Training curves, and where the heads look."""
    table = run.table("baseline/metrics.parquet")
    if table is None or not table.num_rows:
        model = run.config.get("model") or {}
        if model.get("path") or model.get("build"):
            section.absent = "The checkpoint was given, not trained here."
        else:
            section.missing = "No baseline has been trained in this run."
        return
    names = [name for name in ("train_loss", *metrics.described) if name in table.column_names]
    drawn = []
    for metric in names or [c for c in table.column_names if c not in ("step", "seconds")]:
        title = f"{metrics.label(metric)} ends at {number(float(column(table, metric)[-1]))} {metrics.unit(metric)}"
        drawn += figure(title, curves({"base": [table]}, metric, metrics.axis(metric)), metrics.meaning(metric))
    heads = _heads(table)
    words = "No head is scored: this model does not show its attention patterns."
    section.blocks += [Figures(drawn), Figures(heads) if heads else Note(words, "small")]
    evaluation = _flat(run.json("baseline/evaluation.json") or {})
    if evaluation:
        section.blocks.append(Table(["measure", "value"], evaluation, folded="Evaluation of the checkpoint"))


def _heads(table: Any) -> list[Any]:
    """Attention scores of every head at the last evaluation, layer by head."""
    drawn: list[Any] = []
    for kind, words in (("previous_token", "previous-token"), ("prefix_matching", "prefix-matching")):
        found = [match for name in table.column_names if (match := HEAD_COLUMN.fullmatch(name)) and match[1] == kind]
        if not found:
            continue
        layers, heads = max(int(m[2]) for m in found) + 1, max(int(m[3]) for m in found) + 1
        scores = np.full((layers, heads), np.nan)
        for match in found:
            scores[int(match[2]), int(match[3])] = column(table, match[0])[-1]
        layer, head = np.unravel_index(int(np.nanargmax(scores)), scores.shape) if np.isfinite(scores).any() else (0, 0)
        title = f"Strongest {words} head: layer {layer}, head {head} ({number(float(scores[layer, head]), 2)})"
        svg = grid(
            scores,
            [f"layer {i}" for i in range(layers)],
            [str(i) for i in range(heads)],
            f"{words} score of every head",
            x_label="head",
        )
        drawn += figure(title, svg, "Share of attention, at the last evaluation.")
    return drawn


def _flat(value: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Nested entries as rows of (dotted name, words)."""
    rows: list[list[str]] = []
    for key, entry in value.items():
        name = f"{prefix}{key}"
        if isinstance(entry, dict):
            rows += _flat(entry, f"{name}.")
        elif isinstance(entry, list):
            rows.append([name, ", ".join(str(item) for item in entry)])
        else:
            rows.append([name, number(entry, 5) if isinstance(entry, float) else str(entry)])
    return rows


def record(section: Section, run: Run, summary: Mapping[str, Any]) -> None:
    """Seconds of every stage, what is left out or has no effect, manifest, configuration."""
    seconds = {stage: float(s) for stage, s in (summary.get("seconds") or {}).items() if s is not None}
    if seconds:
        total = sum(seconds.values())
        dearest = max(seconds, key=lambda stage: seconds[stage])
        title = f"{duration(total)} in all; {dearest} took {100 * seconds[dearest] / (total or 1):.0f} %"
        svg = bars(list(seconds), list(seconds.values()), "wall-clock seconds", "Seconds of every stage")
        section.blocks.append(Figures(figure(title, svg)))
    manifest = run.json("manifest.json")
    if manifest:
        if remarks := manifest.pop("remarks", None):
            section.blocks.append(Table(["said when the experiment was checked"], [[str(line)] for line in remarks]))
        section.blocks.append(Table(["entry", "value"], _flat(manifest), "Versions, seeds, commit"))
    config = run.text("config.yaml")
    if config:
        section.blocks.append(Note(config, "code"))
    if not section.blocks:
        section.missing = "Neither costs nor a manifest have been written yet."
