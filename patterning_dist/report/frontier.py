"""Effect against cost: a curve for every row of scores, from no weights at all to the strongest that were trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from patterning_dist.report.blocks import Block, Figures, Note
from patterning_dist.report.differences import Contrasts
from patterning_dist.report.figures import arm_style, figure
from patterning_dist.report.reading import ARM_ORDER, in_order, interval_of
from patterning_dist.report.svg import Plot, factor_ticks, padded
from patterning_dist.report.words import Metrics, change, estimate, number

_ABOVE = 0.04  # of the height: where the words of a point are, clear of its intervals


def frontiers(found: Mapping[str, Any], contrasts: Contrasts, metrics: Metrics) -> list[Block]:
    """Figures for every plain arm that rows of scores are held against; nothing where no row has two strengths.

    Args:
        found: ``frontier`` of summary.json.
        contrasts: differences between the arms.
        metrics: what they are called.
    """
    blocks: list[Block] = []
    for base, rows in (found.get("rows") or {}).items():
        drawn = []
        for effect in found["effects"]:
            curves = {row: _curve(points, base, found["cost"], effect, contrasts) for row, points in rows.items()}
            curves = {row: curve for row, curve in curves.items() if curve}
            if curves:
                plot = _plot(curves, effect, found["cost"], base, metrics)
                drawn += figure(_title(curves, effect, metrics), plot, metrics.meaning(effect))
        names = in_order(rows, ARM_ORDER)
        blocks.append(Figures(drawn, legend=[(arm_style(row), row) for row in names]))
    if blocks:
        words = (
            "Effect against cost, both differences from the plain arm over shared seeds (factors where the quantity "
            "grows by them), with 95 % intervals. A curve is one row of scores: it begins at the plain arm, its points "
            "are weights 1 + s h of the same h at rising strengths s, and the number at a point is their effective "
            "sample share. Of two rows the better one has more effect at the same cost."
        )
        blocks.append(Note(words, "small"))
    return blocks


Point = tuple[dict[str, Any], Mapping[str, Any], Mapping[str, Any]]  # arm with its share, cost, effect


def _curve(points: list[dict[str, Any]], base: str, cost: str, effect: str, contrasts: Contrasts) -> list[Point]:
    compared = [(point, contrasts.get(point["arm"], {}).get(base, {})) for point in points]
    return [(point, values[cost], values[effect]) for point, values in compared if cost in values and effect in values]


def _plot(curves: Mapping[str, list[Point]], effect: str, cost: str, base: str, metrics: Metrics) -> Markup:
    everything = [point for curve in curves.values() for point in curve]
    ratios = all(value.get("ratio") for _, _, value in everything)

    def height(value: float) -> float:
        return math.log(value) if ratios else value

    def shown(value: Mapping[str, Any]) -> Mapping[str, Any]:
        return value["ratio"] if ratios else value

    def ends(value: Mapping[str, Any]) -> list[float]:
        return [value["value"], *(interval_of(value) or ())]

    x_range = padded([0.0, *(end for _, paid, _ in everything for end in ends(paid))])
    y_range = padded([0.0, *(height(end) for _, _, value in everything for end in ends(shown(value)))])
    unit = f" ({metrics.unit(effect)})" if metrics.unit(effect) and not ratios else ""
    plot = Plot(
        x_range,
        y_range,
        height=300,
        left=58,
        x_label=f"{metrics.in_sentence(cost).removeprefix('the ')} less that of {base} ({metrics.unit(cost)})",
        y_label=f"{'times' if ratios else 'less'} that of {base}{unit}",
        y_ticks=factor_ticks(*y_range) if ratios else None,
    )
    plot.rule(x=0.0, style="zero")
    plot.rule(y=0.0, style="zero")
    for row in in_order(curves, ARM_ORDER):
        style, curve = arm_style(row), curves[row]
        xs = [0.0, *(paid["value"] for _, paid, _ in curve)]
        ys = [0.0, *(height(shown(value)["value"]) for _, _, value in curve)]
        plot.curve(np.array(xs), np.array(ys), f"{style} thick")
        for (point, paid, value), x, y in zip(curve, xs[1:], ys[1:], strict=True):
            if interval := interval_of(paid):
                plot.span(*interval, y, style)
            if interval := interval_of(shown(value)):
                plot.span_up(height(interval[0]), height(interval[1]), x, style)
            tip = f"{point['arm']}: {change(value)} for {estimate(paid, sign=True)}"
            plot.dot(x, y, style, 5, tip)
            if point["share"]:
                plot.words(x, y + _ABOVE * (y_range[1] - y_range[0]), number(point["share"], 2), shift=6)
    return plot.svg(f"{metrics.label(effect)} against {metrics.in_sentence(cost)}, for {', '.join(curves)}")


def _title(curves: Mapping[str, list[Point]], effect: str, metrics: Metrics) -> str:
    """What the strongest weights of every row came to."""
    words = []
    for row in in_order(curves, ARM_ORDER):
        _, paid, value = curves[row][-1]
        ratio = value.get("ratio")
        amount = f"times {number(ratio['value'], 2)}" if ratio else number(value["value"], 2, sign=True)
        words.append(f"{row} {amount} for {number(paid['value'], 2, sign=True)}")
    return f"{metrics.label(effect)} against its cost: {', '.join(words)}"
