"""The page of the parentheses experiment: which rule the networks of every arm follow, and why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from patterning_dist.report.blocks import Figure, Figures, Note, Section, Table
from patterning_dist.report.figures import intervals
from patterning_dist.report.page import when, write_page
from patterning_dist.report.svg import Plot, padded
from patterning_dist.report.words import duration, estimate, number

_NAMES = {
    "base": "plain",
    "nested": "toward NESTED",
    "equal_count": "toward EQUAL-COUNT",
    "permuted": "permuted weights",
    "online_nested": "toward NESTED, online",
    "online_equal_count": "toward EQUAL-COUNT, online",
    "one_phase_nested": "toward NESTED, one phase",
    "one_phase_equal_count": "toward EQUAL-COUNT, one phase",
    "minimum_norm_nested": "minimum norm, NESTED",
    "minimum_norm_equal_count": "minimum norm, EQUAL-COUNT",
    "loss_nested": "loss contrast, NESTED",
    "loss_equal_count": "loss contrast, EQUAL-COUNT",
}
_STYLES = {
    "base": "arm-base",
    "nested": "arm-plus",
    "online_nested": "arm-plus",
    "equal_count": "arm-minus",
    "online_equal_count": "arm-minus",
    "permuted": "arm-permuted",
}
_QUANTITIES = {"llc": "LLC", "free_energy": "free energy"}
_DIRECTIONS = {"direction": "expected losses (the one used)", "llc": "LLC"}
_RULES = {"nested": "NESTED", "equal_count": "EQUAL-COUNT"}


def write_parentheses_page(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the page of a finished run from its summary.json."""
    write_page(
        path,
        kind="Choosing the algorithm",
        name=summary["name"],
        created=when(summary["created"]),
        status="all stages run",
        warnings=list(summary["warnings"]),
        sections=[
            _arms(summary["arms"]),
            _rounds(summary["rounds"]),
            _llc(summary["llc"], summary["reliability"]),
            _check(summary["check"]),
            _strings(summary["strings"]),
            _cost(summary["seconds"]),
        ],
    )


def _arms(arms: Mapping[str, Any]) -> Section:
    lead = (
        "Both rules fit the training strings. Strings of equal counts that do not nest tell them apart: a network that "
        "follows NESTED rejects all of them (1), one that follows EQUAL-COUNT none (0). Every dot is a network."
    )
    rows = [
        [
            _name(arm),
            str(entry["num_networks"]),
            estimate(entry["rejected"]),
            "–" if arm == "base" else estimate(entry["difference_from_base"], sign=True),
            *(estimate(entry[share]) for share in ("above_half", "clean_nested", "clean_equal_count")),
            f"{number(100 * entry['train_accuracy_min'], decimals=2)} %",
            estimate(entry["first_symbol"], sign=True),
        ]
        for arm, entry in arms.items()
    ]
    headers = [
        "arm",
        "networks",
        "rejected",
        "against plain, paired",
        "share above .5",
        "above .9",
        "below .1",
        "worst training accuracy",
        "first-symbol difference",
    ]
    note = (
        "Intervals are 95 %: Student's over networks for means, exact binomial ones for shares; the strings, the "
        "references and the weights are fixed. First-symbol difference: rejected among strings that begin with “)” "
        "minus among those with “(”, 1 for a network that looks at nothing else."
    )
    figure = Figure("Share of out-of-distribution strings rejected", _distributions(arms))
    return Section(
        "arms",
        "Which rule the networks follow",
        [Note(lead, "lead"), Figures([figure]), Table(headers, rows), Note(note)],
    )


def _distributions(arms: Mapping[str, Any]) -> Markup:
    """A row of dots an arm, with its mean and interval."""
    names = [_name(arm) for arm in arms]
    plot = Plot(
        (-0.02, 1.02),
        (len(names), 0),
        rows=names,
        left=14 + int(6.8 * max(map(len, names))),
        height=48 + 34 * len(names),
        x_label="share rejected: 0 EQUAL-COUNT, 1 NESTED",
    )
    for row, (arm, entry) in enumerate(arms.items()):
        style = _STYLES.get(arm, "arm-other")
        # Dots of like networks lie above each other.
        for place, value in enumerate(np.sort(entry["rejected"]["per_seed"])):
            plot.dot(value, row + 0.66 + 0.05 * (place % 5), f"{style} faint", 2.4, f"{_name(arm)}: {number(value)}")
        low, high = entry["rejected"]["interval"]
        plot.span(max(low, 0.0), min(high, 1.0), row + 0.36, style)
        plot.dot(entry["rejected"]["value"], row + 0.36, style, 5, f"{_name(arm)}: {estimate(entry['rejected'])}")
    return plot.svg("Share of out-of-distribution strings that the networks of every arm reject")


def _rounds(rounds: list[dict[str, Any]]) -> Section:
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
                _round_name(entry["round"]),
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


def _llc(llc: Mapping[str, Any], reliability: Mapping[str, Any]) -> Section:
    rows = []
    for rule, entry in llc.items():
        style = _STYLES[rule]
        rows.append((f"{_RULES[rule]}, mean", style, "dot", entry))
        for place, network in enumerate(entry["per_network"], start=1):
            rows.append((f"{_RULES[rule]} {place}", f"{style} faint", "dot", network))
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


def _check(rows: list[dict[str, Any]]) -> Section:
    lead = (
        "Chains around the same references under changed weights: strength 1 is the full weights toward NESTED, −1 "
        "those toward EQUAL-COUNT. The line is what linear response predicts, the dots what was measured."
    )
    figures = []
    for quantity, words in _QUANTITIES.items():
        for rule, name in _RULES.items():
            points = sorted(
                (row for row in rows if row["quantity"] == quantity and row["rule"] == rule),
                key=lambda row: row["strength"],
            )
            figures.append(Figure(f"{words} of {name}", _prediction(points, f"change of {words}", _STYLES[rule])))
    table = Table(
        ["quantity", "rule", "strength", "predicted", "measured", "measured − predicted"],
        [
            [
                _QUANTITIES[row["quantity"]],
                _RULES[row["rule"]],
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


def _strings(strings: Mapping[str, list[dict[str, Any]]]) -> Section:
    lead = "The strings that the weights toward NESTED raise and lower most; weights in units of plain training."
    tables = [
        Table(
            ["string", "sample id", "weight"],
            [[s["text"], str(s["sample_id"]), number(s["relative_weight"])] for s in strings[f"{label}_{side}"]],
            title=f"{label.capitalize()}, {words}",
        )
        for label in ("balanced", "unbalanced")
        for side, words in (("up", "weighted up"), ("down", "weighted down"))
    ]
    return Section("strings", "The strings that decide", [Note(lead, "lead"), *tables])


def _cost(seconds: Mapping[str, float]) -> Section:
    return Section("cost", "Cost", [Table(["stage", "time"], [[s, duration(v)] for s, v in seconds.items()])])


def _round_name(name: str) -> str:
    side, _, count = name.removeprefix("toward_").rpartition("_")
    return f"{_NAMES[side]}, round {count}" if side else "plain strings"


def _name(arm: str) -> str:
    return _NAMES.get(arm) or arm.replace("shuffled_", "shuffled labels ")
