"""The solutions that were sampled around: their LLC, how far their direction can be relied on, and what it predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from patterning_dist.experiments.two_rules.page.labels import NAMES, RULES, STYLES
from patterning_dist.report.blocks import Figure, Figures, Note, Section, Table
from patterning_dist.report.figures import intervals
from patterning_dist.report.svg import Plot, padded
from patterning_dist.report.words import estimate, number

_QUANTITIES = {"llc": "change of the LLC", "free_energy": "slope of the free energy"}
_DIRECTIONS = {"direction": "expected losses (the one used)", "llc": "LLC"}


def rounds_section(rounds: list[dict[str, Any]]) -> Section:
    """Every round: its networks, its references, and how its direction agrees with itself and with the last."""
    lead = (
        "A direction is measured on networks of plain strings. The online arms measure again, on fresh networks under "
        "the weights so far: what separates those that reject most from those that reject least is added to the score."
    )
    rows = []
    for entry in rounds:
        shares = {
            rule: [network["rejected"] for network in entry["references"] if network["rule"] == rule]
            for rule in ("nested", "equal_count")
        }
        rows.append(
            [
                _roundarm_name(entry["round"]),
                str(entry["num_networks"]),
                estimate(entry["rejected"]),
                *(f"{number(min(found))} to {number(max(found))}" for found in shares.values()),
                number(entry["reliability"]["direction"].get("between_chains")),
                number(entry["reliability"]["direction"]["between_solutions"]),
                number(entry["correlation_with_score"]),
            ]
        )
    headers = [
        "round",
        "networks",
        "rejected",
        "upper references",
        "lower references",
        "reliability between chains",
        "between solutions",
        "correlation with the score so far",
    ]
    return Section("rounds", "The rounds", [Note(lead, "lead"), Table(headers, rows)])


def llc_section(llc: Mapping[str, Any], reliability: Mapping[str, Any]) -> Section:
    """LLC of every reference, and the reliability of the directions."""
    rows = []
    for rule, entry in llc.items():
        style = STYLES[rule]
        rows.append((f"{RULES[rule]}, mean", style, "dot", entry))
        for place, network in enumerate(entry["per_network"], start=1):
            rows.append((f"{RULES[rule]} {place}", f"{style} faint", "dot", network))
    table = Table(
        ["direction between the rules from", "between chains", "between solutions"],
        [
            [_DIRECTIONS[name], number(entry.get("between_chains")), number(entry["between_solutions"])]
            for name, entry in reliability.items()
        ],
        title="Reliability of the direction (correlation over strings)",
    )
    note = (
        "LLC: n_beta (E[L] − L(w*)) of the tempered posterior localised at a network, so an estimate at these settings "
        "and not the limit. Intervals of single networks are those of the sampling, that of a mean is over networks."
    )
    figure = Figure("Local learning coefficient of the references", intervals(rows, "LLC", "LLC of the references"))
    return Section("llc", "The solutions", [Figures([figure]), Note(note), table])


def _roundarm_name(name: str) -> str:
    side, _, count = name.removeprefix("toward_").rpartition("_")
    return f"{NAMES[side]}, round {count}" if side else "plain strings"


def check_section(rows: list[dict[str, Any]]) -> Section:
    """Prediction and measurement at every strength, as figures and as a table."""
    lead = (
        "Chains around references that the weights were not solved from, under these weights: strength 1 is the full "
        "ones toward NESTED, −1 those toward EQUAL-COUNT. Diamonds are what linear response at the references that the "
        "weights were solved from predicts, dots what was measured: of the LLC its change from plain weights, of the "
        "free energy its slope along the weights at that strength, so that no part of it is the prediction."
    )
    figures = []
    for quantity, words in _QUANTITIES.items():
        for rule, name in RULES.items():
            points = sorted(
                (row for row in rows if row["quantity"] == quantity and row["rule"] == rule),
                key=lambda row: row["strength"],
            )
            figures.append(Figure(f"{words} of {name}", _prediction(points, words, STYLES[rule])))
    table = Table(
        ["quantity", "rule", "strength", "predicted", "linear, here", "measured", "measured − linear"],
        [
            [
                _QUANTITIES[row["quantity"]],
                RULES[row["rule"]],
                number(row["strength"], sign=True),
                *(estimate(row[kind], sign=True) for kind in ("predicted", "linear", "measured", "difference")),
            ]
            for row in rows
        ],
    )
    note = (
        "Intervals are over the references. “Linear, here” is the linear response at the references that are measured, "
        "by chains of the same noise and minibatches; what is measured beyond it is beyond first order."
    )
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
