"""What linear response predicts of LLC and free energy, and what chains under changed weights measure."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup

from patterning_dist.experiments.two_rules.page.labels import RULES, STYLES
from patterning_dist.report.blocks import Figure, Figures, Note, Section, Table
from patterning_dist.report.svg import Plot, padded
from patterning_dist.report.words import estimate, number

_QUANTITIES = {"llc": "LLC", "free_energy": "free energy"}


def check_section(rows: list[dict[str, Any]]) -> Section:
    """Prediction and measurement at every strength, as figures and as a table."""
    lead = (
        "Chains around the same references under changed weights: strength 1 is the full weights toward NESTED, −1 "
        "those toward EQUAL-COUNT. The line is what linear response predicts, the dots what was measured."
    )
    figures = []
    for quantity, words in _QUANTITIES.items():
        for rule, name in RULES.items():
            points = sorted(
                (row for row in rows if row["quantity"] == quantity and row["rule"] == rule),
                key=lambda row: row["strength"],
            )
            figures.append(Figure(f"{words} of {name}", _prediction(points, f"change of {words}", STYLES[rule])))
    table = Table(
        ["quantity", "rule", "strength", "predicted", "measured", "measured − predicted"],
        [
            [
                _QUANTITIES[row["quantity"]],
                RULES[row["rule"]],
                number(row["strength"], sign=True),
                *(estimate(row[kind], sign=True) for kind in ("predicted", "measured", "difference")),
            ]
            for row in rows
        ],
    )
    note = "Intervals are over the references, which predicted and measured values share."
    return Section("check", "Predicted and measured", [Note(lead, "lead"), Figures(figures), table, Note(note)])


def _prediction(points: list[dict[str, Any]], label: str, style: str) -> Markup:
    ends = [end for p in points for k in ("predicted", "measured") for end in (p[k]["interval"] or [p[k]["value"]])]
    plot = Plot(
        padded(np.array([p["strength"] for p in points]), include=[0.0]),
        padded(np.array(ends), include=[0.0]),
        x_label="strength",
        y_label=label,
    )
    plot.rule(y=0.0)
    line = sorted([(0.0, 0.0), *((p["strength"], p["predicted"]["value"]) for p in points)])
    plot.curve(np.array([x for x, _ in line]), np.array([y for _, y in line]), f"{style} thin")
    for point in points:
        for kind, shift in (("predicted", -0.02), ("measured", 0.02)):
            if point[kind]["interval"]:
                x = point["strength"] + shift
                plot.curve(np.array([x, x]), np.array(point[kind]["interval"]), f"{style} thin")
        tip = f"strength {number(point['strength'], sign=True)}: "
        predicted, measured = point["predicted"], point["measured"]
        plot.diamond(point["strength"] - 0.02, predicted["value"], style, f"{tip}predicted {estimate(predicted)}")
        plot.dot(point["strength"] + 0.02, measured["value"], style, 5, f"{tip}measured {estimate(measured)}")
    return plot.svg(f"{label} against strength: predicted and measured")
