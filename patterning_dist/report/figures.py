"""The drawings that several sections share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from patterning_dist.report.blocks import Figure
from patterning_dist.report.reading import column, interval_of
from patterning_dist.report.svg import Plot, factor_ticks, padded
from patterning_dist.report.words import duration, estimate, number, times

KNOWN_ARMS = ("base", "plus", "minus", "permuted")
NUM_OTHERS = 4  # colours of other arms in figures.css, one after another
TRACE_POINTS = 240  # of a line


def arm_style(arm: str) -> str:
    """The style classes of an arm; those of an unknown one get their colour by ``own_colours``."""
    return f"arm-{arm}" if arm in KNOWN_ARMS else f"arm-other arm-own-{re.sub('[^A-Za-z0-9_-]', '_', arm)}"


def own_colours(page: str) -> str:
    """Rules of a style sheet that give every arm of the page but the known ones a colour; later ones are dashed."""
    rules = []
    for index, own in enumerate(dict.fromkeys(re.findall(r"\barm-own-[\w-]+", page))):
        dashes = "" if index % (2 * NUM_OTHERS) < NUM_OTHERS else " --dashes: 2 4; --line: dotted;"
        rules.append(f".{own} {{ --arm: var(--other-{index % NUM_OTHERS + 1});{dashes} }}")
    return "\n".join(rules)


def intervals(
    rows: Sequence[tuple[str, str, str, dict[str, Any]]],
    x_label: str,
    description: str,
    row_height: int = 34,
    *,
    ratios: bool = False,
) -> Markup:
    """A forest plot with a rule at zero; rows are (label, style, mark, estimate: value, interval, per_seed).

    mark is `dot` for what was measured, `ring` for what chains measured, `diamond` for what was predicted, `open` for a
    linear response on the samples that were solved on. Ratios lie at their logarithms, and the rule at one.
    """

    def place(value: float | None) -> float:
        return np.nan if value is None else float(np.log(value)) if ratios else value

    values = [0.0]
    for _, _, _, value in rows:
        there = [value["value"], *(interval_of(value) or ()), *(value.get("per_seed") or ())]
        values += [place(one) for one in there]
    x_range = padded(np.array(values, dtype=np.float64))
    ticks = factor_ticks(*x_range) if ratios else None
    plot = Plot.of_rows([row[0] for row in rows], x_range, row_height, x_label=x_label, x_ticks=ticks)
    plot.rule(x=0.0, style="zero")
    for index, (name, style, mark, value) in enumerate(rows):
        middle = index + 0.5
        for seed_value in value.get("per_seed") or ():
            plot.dot(place(seed_value), middle + 0.24, f"{style} faint", 2.4, f"one seed: {number(seed_value)}")
        interval = interval_of(value)
        if interval is not None:
            plot.span(place(interval[0]), place(interval[1]), middle, style)
        tip = f"{name}: {times(value) if ratios else estimate(value, sign=True)}"
        if mark in ("dot", "ring"):
            plot.dot(place(value["value"]), middle, style if mark == "dot" else f"{style} hollow", 5, tip)
        else:
            plot.diamond(place(value["value"]), middle, f"{style} {'hollow' if mark == 'open' else ''}", tip)
    return plot.svg(description)


def trace_lines(
    chains: Sequence[tuple[np.ndarray, np.ndarray]], x_label: str, y_label: str, description: str, burn_in: int = 0
) -> Markup:
    """Lines (x, y), one a chain, with a rule at zero; the burn-in, from 0 on, is shaded."""
    xs, ys = (np.concatenate(parts) for parts in zip(*chains, strict=True))
    first = 0.0 if burn_in else float(xs.min())
    x_range = (first, float(max(xs.max(), first + 1)))
    plot = Plot(x_range, padded(ys), x_label=x_label, y_label=y_label, left=58, height=195)
    if burn_in:
        plot.box((0, burn_in), plot.y_range, "neutral", 0.22, f"burn-in: {burn_in} steps")
    if plot.y_range[0] < 0 < plot.y_range[1]:
        plot.rule(y=0.0)
    for index, (x, y) in enumerate(chains):
        shown = slice(None, None, max(1, -(-len(x) // TRACE_POINTS)))
        plot.curve(x[shown], y[shown], f"trace trace-{index % 6}")
    return plot.svg(description)


def mean_curve(tables: Sequence[pa.Table], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds at the steps which every seed has: a seed that is behind does not bend the line."""
    per_seed = [dict(zip(column(t, "step").tolist(), column(t, metric).tolist(), strict=True)) for t in tables]
    steps = sorted(set.intersection(*(set(seed) for seed in per_seed)))
    return np.array(steps), np.array([np.mean([seed[step] for seed in per_seed]) for step in steps])


def _below(values: np.ndarray, ceiling: float) -> np.ndarray:
    return np.where(values <= ceiling, values, np.nan)


def curves(
    groups: Mapping[str, Sequence[pa.Table]],
    metric: str,
    y_label: str,
    threshold: float | None = None,
    transitions: dict[str, Sequence[int | None]] | None = None,
) -> Markup | None:
    """A metric against the step: every seed thin, each group's mean thick; None where nobody has it."""
    groups = {name: [t for t in tables if metric in t.column_names] for name, tables in groups.items()}
    groups = {name: tables for name, tables in groups.items() if tables}
    if not groups:
        return None
    ys = np.concatenate([column(t, metric) for tables in groups.values() for t in tables])
    last = max(int(column(t, "step").max()) for tables in groups.values() for t in tables)
    if metric.endswith("_loss"):  # the fall of the first steps would flatten all that follows
        late = np.concatenate([column(t, "step") >= 0.2 * last for tables in groups.values() for t in tables])
        ys = ys[late] if late.any() else ys
    y_range = padded(ys, include=[] if threshold is None else [threshold, 0])
    ceiling = y_range[1]
    plot = Plot((0, max(last, 1)), y_range, x_label="training step", y_label=y_label)
    if threshold is not None:
        plot.rule(y=threshold, words=f"{number(threshold)}")
    for name, tables in groups.items():
        if len(tables) > 1:
            for table in tables:
                plot.curve(column(table, "step"), _below(column(table, metric), ceiling), f"{arm_style(name)} thin")
    for name, tables in groups.items():
        steps, mean = mean_curve(tables, metric)
        shown = _below(mean, ceiling)
        plot.curve(steps, shown, f"{arm_style(name)} thick")
        for step, value in zip(steps, shown, strict=True):
            plot.dot(step, value, "ghost", 6, f"{name}, step {number(step)}: {number(value)}")
    for name, passed in (transitions or {}).items():
        for step in passed:
            if step is not None and name in groups:
                plot.dot(
                    step,
                    threshold or 0,
                    f"{arm_style(name)} ringed",
                    4,
                    f"{name} passes {threshold} at step {number(step)}",
                )
    return plot.svg(f"{metric} against training step, for {', '.join(groups)}")


def grid(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    description: str,
    *,
    tip: str = "",
    x_label: str = "",
) -> Markup:
    """A heat-map with its numbers in it: one colour from 0 up, or two around zero."""
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    height = min(46, max(24, 180 // len(rows)))
    plot = Plot.of_rows(rows, (0, len(columns)), height, columns=columns, x_label=x_label)
    for i, row in enumerate(rows):
        for j, name in enumerate(columns):
            value = float(values[i, j])
            shade = min(1.0, abs(value) / (largest or 1.0)) if np.isfinite(value) else 0.0
            style = "negative" if value < 0 else "positive"
            plot.box(
                (j + 0.02, j + 0.98),
                (i + 0.04, i + 0.96),
                style,
                0.9 * shade,
                f"{row}, {name}{tip}: {number(value)}",
            )
            if len(columns) <= 10:
                words = number(value, decimals=2)
                plot.words(j + 0.5, i + 0.5, words, "cell strong" if shade > 0.62 else "cell", "middle")
    return plot.svg(description)


def bars(names: Sequence[str], values: Sequence[float], x_label: str, description: str) -> Markup:
    """Horizontal bars from zero, each with its number of seconds."""
    plot = Plot.of_rows(names, (0, max(values) * 1.22 or 1.0), 28, x_label=x_label)
    for index, value in enumerate(values):
        words = duration(value)
        plot.box((0, value), (index + 0.2, index + 0.8), "neutral", 1.0, f"{names[index]}: {words}")
        plot.words(value, index + 0.5, words, shift=6)
    return plot.svg(description)


def histogram(edges: np.ndarray, counts: np.ndarray, style: str, description: str) -> Markup:
    """Counts on a logarithmic scale (powers of ten), so that the tails are seen."""
    top = max(1.0, float(np.log10(max(counts.max(), 1))) * 1.05)
    ticks = [(float(power), number(10**power)) for power in range(0, int(top) + 1)]
    plot = Plot(
        (edges[0], edges[-1]),
        (0, top + 0.3),
        x_label="weight",
        y_label="losses (log scale)",
        y_ticks=[(t + 0.3, w) for t, w in ticks],
    )
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count > 0:
            tip = f"{number(count, decimals=0)} losses with weight {number(low)} to {number(high)}"
            plot.box((low, high), (0, np.log10(count) + 0.3), style, 0.85, tip)
    if edges[0] < 1 < edges[-1]:
        plot.rule(x=1.0)
    return plot.svg(description)


def scatter(xs: np.ndarray, ys: np.ndarray, x_label: str, y_label: str, description: str) -> Markup:
    """Points, or squares shaded by their number where there are too many points to tell apart."""
    plot = Plot(padded(xs), padded(ys), x_label=x_label, y_label=y_label, height=300, left=58)
    if plot.x_range[0] < 0 < plot.x_range[1]:
        plot.rule(x=0.0)
    if plot.y_range[0] < 0 < plot.y_range[1]:
        plot.rule(y=0.0)
    if xs.size <= 500:
        for x, y in zip(xs, ys, strict=True):
            plot.dot(x, y, "cloud", 3, f"{number(x)}, {number(y)}")
        return plot.svg(description)
    counts, x_edges, y_edges = np.histogram2d(xs, ys, bins=36)
    for i, j in np.argwhere(counts > 0):
        shade = 0.12 + 0.88 * np.log1p(counts[i, j]) / np.log1p(counts.max())
        plot.box(
            (x_edges[i], x_edges[i + 1]),
            (y_edges[j], y_edges[j + 1]),
            "positive",
            shade,
            f"{int(counts[i, j])} points",
        )
    return plot.svg(description)


def figure(title: str, svg: Markup | None, note: str = "") -> list[Figure]:
    """The figure as a list of one, or of none where there was nothing to draw."""
    return [] if svg is None else [Figure(title, svg, note)]
