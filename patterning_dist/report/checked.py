"""What coupled chains measured: slopes at 0 against chi, and the change at every strength."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patterning_dist.report.blocks import Figures, Note, Table
from patterning_dist.report.figures import arm_style, figure, intervals
from patterning_dist.report.words import Metrics, estimate, listed, number


def checks(checked: Mapping[str, Any], metrics: Metrics) -> list[Any]:
    """Figures and tables of the content of check/response.json."""
    rows = [
        [strength, name, number(entry.get("predicted"), sign=True), estimate(entry, sign=True)]
        for strength, entries in (checked.get("strengths") or {}).items()
        for name, entry in entries.items()
    ]
    title = f"Chains of {checked.get('subject')} under {checked.get('weights')} weights, at multiples of them"
    table = Table(["strength", "observable", "predicted", "checked"], rows, title)
    slopes = checked.get("slopes") or {}
    return [*_slopes(slopes, arm_style(str(checked.get("weights"))), metrics), table] if slopes else [table]


def _slopes(slopes: Mapping[str, Any], style: str, metrics: Metrics) -> list[Any]:
    """The slope of every row at strength 0, with its interval, beside what chi says that it is."""
    drawn, rows, by_unit = list[Any](), list[list[str]](), dict[str, dict[str, Any]]()
    for name, slope in slopes.items():
        by_chi = {"value": slope.get("predicted"), "interval": slope.get("predicted_interval")}
        verdict = slope.get("verdict", "–")
        judged = (number(slope.get("ratio")), number(slope.get("z"), sign=True), verdict)
        rows.append([metrics.label(name), estimate(by_chi, sign=True), estimate(slope, sign=True), *judged])
        of_unit = by_unit.setdefault(metrics.unit(name), {"lines": [], "verdicts": {}})
        if "verdict" in slope:
            of_unit["lines"].append((f"{metrics.term(name)}: chi", style, "open", by_chi))
            of_unit["verdicts"].setdefault(verdict, []).append(metrics.in_sentence(name))
        of_unit["lines"].append((f"{metrics.term(name)}: checked", style, "ring", slope))
    for unit, found in by_unit.items():
        said = ", ".join(f"{listed(names)}: {verdict}" for verdict, names in found["verdicts"].items())
        svg = intervals(found["lines"], f"slope ({unit or 'its unit'})", "Slopes at strength 0", row_height=22)
        drawn += figure(f"Slope at strength 0 against chi{'; ' if said else ''}{said}", svg)
    pair = number(next(iter(slopes.values())).get("strength"))
    words = (
        f"The slope at strength 0 is that between coupled chains at {pair} and −{pair} times the weights, "
        "free of second order. Chi of a target is what was solved for, on the samples that the weights were solved on: "
        "where it disagrees, it may be no more than that. Not resolved: neither can be told from 0."
    )
    headers = ["observable", "chi", "checked", "checked / chi", "z", "verdict"]
    return [Figures(drawn), Note(words, "small"), Table(headers, rows, "Slopes at strength 0, with 95 % intervals")]
