"""Local learning coefficients: one a component, or over the checkpoints of a training with bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from patterning_dist.report.blocks import Figure, Figures, Note
from patterning_dist.report.colours import NUM_STYLES
from patterning_dist.report.drawing import Drawing
from patterning_dist.report.figures import intervals
from patterning_dist.report.probe import BASELINE
from patterning_dist.report.reading import interval_of
from patterning_dist.report.svg import Plot, padded
from patterning_dist.report.words import estimate, number
from patterning_dist.response.failure_modes import MAX_RHAT

SHOWN_SUBJECTS = 24
_NOTE = "n_beta times the mean rise of the loss over the checkpoint, error over draws and chains."


def coefficients(subjects: Mapping[str, Any]) -> Drawing:
    """LLC of every component with its 95 % interval, over the checkpoints where there are several.

    Args:
        subjects: of response/diagnostics.json, in the order of the training.
    """
    found = {
        name: entry
        for name, entry in subjects.items()
        if "~" not in name and (entry.get("llc") or {}).get("value") is not None
    }
    title = "Local learning coefficients"
    if not found:
        return Drawing(title, [Note("No chain has told a local learning coefficient yet.")], {})
    places = {name: _place(name) for name in found}
    checkpoints = list(dict.fromkeys(checkpoint for checkpoint, _ in places.values()))
    numbers = {
        "checkpoint": [checkpoint for checkpoint, _ in places.values()],
        "component": [component for _, component in places.values()],
        **{key: [entry["llc"].get(key) for entry in found.values()] for key in ("value", "standard_error")},
        "low": [(interval_of(entry["llc"]) or (np.nan, np.nan))[0] for entry in found.values()],
        "high": [(interval_of(entry["llc"]) or (np.nan, np.nan))[1] for entry in found.values()],
        "rhat": [_rhat(entry) for entry in found.values()],
    }
    drawn = _over_training(found, places, checkpoints) if len(checkpoints) > 1 else [_of_one(found)]
    return Drawing(title, drawn, numbers)


def _place(subject: str) -> tuple[str, str]:
    checkpoint, _, component = subject.rpartition("/")
    return checkpoint or BASELINE, component


def _rhat(entry: Mapping[str, Any]) -> float:
    """The worst of all observables."""
    return max((row["rhat"] for row in entry["observables"].values() if row.get("rhat") is not None), default=np.nan)


def _of_one(found: Mapping[str, Any]) -> Figures:
    rows = [(name, "arm-base", "dot", entry["llc"]) for name, entry in list(found.items())[:SHOWN_SUBJECTS]]
    svg = intervals(rows, "local learning coefficient", "Local learning coefficients")
    return Figures([Figure("Local learning coefficient of every subject", svg, _NOTE)])


def _over_training(
    found: Mapping[str, Any], places: Mapping[str, tuple[str, str]], checkpoints: Sequence[str]
) -> list[Any]:
    """A line and a band a component; hollow points where its chains have not met."""
    lines: dict[str, dict[str, Any]] = {}
    for name, (checkpoint, component) in places.items():
        lines.setdefault(component, {})[checkpoint] = found[name]
    spread = {c: np.ptp([entry["llc"]["value"] for entry in line.values()]) for c, line in lines.items()}
    coloured = sorted(lines, key=lambda c: -spread[c])[:NUM_STYLES]
    styles = {c: f"group-{coloured.index(c)}" if c in coloured else "group-rest" for c in lines}
    values = [end for entry in found.values() for end in (interval_of(entry["llc"]) or (entry["llc"]["value"],) * 2)]
    ticks = _ticks(checkpoints)
    last = len(checkpoints) - 1
    label = "checkpoint, in the order of the training"
    plot = Plot((-0.3, last + 0.3), padded(values), x_label=label, y_label="LLC", height=300, x_ticks=ticks)
    if plot.y_range[0] < 0:
        plot.rule(y=0.0)
    steps = np.arange(len(checkpoints))
    for component, line in lines.items():
        ends = [interval_of(line[c]["llc"]) if c in line else None for c in checkpoints]
        low, high = (np.array([end[k] if end else np.nan for end in ends]) for k in range(2))
        plot.band(steps, low, high, styles[component])
    have_not_met = []
    for component, line in lines.items():
        middle = np.array([line[c]["llc"]["value"] if c in line else np.nan for c in checkpoints])
        middle = np.array([line[c]["llc"]["value"] if c in line else np.nan for c in checkpoints])
        plot.curve(steps, middle, styles[component])
        for step, checkpoint in enumerate(checkpoints):
            if checkpoint in line:
                entry, rhat = line[checkpoint]["llc"], _rhat(line[checkpoint])
                met = not rhat > MAX_RHAT
                have_not_met += [] if met else [f"{component} at {checkpoint}"]
                tip = f"{component}, {checkpoint}: {estimate(entry)}, R-hat {number(rhat, decimals=3)}"
                plot.dot(step, entry["value"], f"{styles[component]} {'' if met else 'hollow'}", 4, tip)
    legend = [(styles[c], c) for c in coloured] + ([("group-rest", "others")] if len(lines) > len(coloured) else [])
    note = f"{_NOTE} Bands: 95 % intervals."
    if have_not_met:
        note += f" Hollow: chains have not met (R-hat above {MAX_RHAT}), so the value is of the places they saw."
    figure = Figure(_moved(lines, checkpoints), plot.svg("Local learning coefficients over the checkpoints"), note)
    return [Figures([figure], legend=legend)]


def _ticks(checkpoints: Sequence[str]) -> list[tuple[float, str]]:
    """At most six names."""
    chosen = np.unique(np.linspace(0, len(checkpoints) - 1, min(6, len(checkpoints))).astype(int))
    return [(float(k), checkpoints[k]) for k in chosen]


def _moved(lines: Mapping[str, Mapping[str, Any]], checkpoints: Sequence[str]) -> str:
    """The component whose LLC moves most from the first to the last checkpoint, where the intervals are apart."""
    first, last, apart = checkpoints[0], checkpoints[-1], {}
    for component, line in lines.items():
        ends = [interval_of(line[c]["llc"]) if c in line else None for c in (first, last)]
        if ends[0] and ends[1] and (ends[0][1] < ends[1][0] or ends[1][1] < ends[0][0]):
            apart[component] = line[last]["llc"]["value"] - line[first]["llc"]["value"]
    if not apart:
        return f"From {first} to {last} no LLC moves by more than its interval"
    largest = max(apart, key=lambda c: abs(apart[c]))
    verb = "grows" if apart[largest] > 0 else "falls"
    values = [number(lines[largest][c]["llc"]["value"]) for c in (first, last)]
    return f"The LLC of {largest} {verb} from {values[0]} at {first} to {values[1]} at {last}"
