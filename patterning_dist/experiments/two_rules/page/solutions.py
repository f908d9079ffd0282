"""The solutions that were sampled around: in every round, their LLC, and how far their direction can be relied on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patterning_dist.experiments.two_rules.page.labels import NAMES, RULES, STYLES
from patterning_dist.report.blocks import Figure, Figures, Note, Section, Table
from patterning_dist.report.figures import intervals
from patterning_dist.report.words import estimate, number

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
