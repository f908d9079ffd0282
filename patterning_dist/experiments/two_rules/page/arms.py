"""Which rule the networks of every arm follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patterning_dist.experiments.two_rules.page.labels import STYLES, arm_name
from patterning_dist.report.blocks import Figure, Figures, Note, Section, Table
from patterning_dist.report.figures import intervals
from patterning_dist.report.words import estimate, number


def arms_section(arms: Mapping[str, Any], contrasts: Sequence[Mapping[str, Any]]) -> Section:
    """Every arm: its networks as dots, its mean and shares with intervals, its differences from others."""
    lead = (
        "Both rules fit the training strings. Strings of equal counts that do not nest tell them apart: a network that "
        "follows NESTED rejects all of them (1), one that follows EQUAL-COUNT none (0). Every dot is a network."
    )
    rows = [
        [
            arm_name(arm),
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
        "minus among those with “(”, 1 for a network that looks at nothing else. Free energy and LLC: weights of "
        "minimum norm for the responses of these as they are, lower for the one rule and higher for the other."
    )
    dots = [(arm_name(arm), STYLES.get(arm, "arm-other"), "dot", entry["rejected"]) for arm, entry in arms.items()]
    what = "Share of out-of-distribution strings that the networks of every arm reject"
    svg = intervals(dots, "share rejected: 0 EQUAL-COUNT, 1 NESTED", what)
    figure = Figure("Share of out-of-distribution strings rejected", svg)
    return Section(
        "arms",
        "Which rule the networks follow",
        [Note(lead, "lead"), Figures([figure]), Table(headers, rows), Note(note), _contrasts(contrasts)],
    )


def _contrasts(contrasts: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            arm_name(entry["arm"]),
            arm_name(entry["other"]),
            str(entry["num_networks"]),
            estimate(entry["difference"], sign=True),
        ]
        for entry in contrasts
    ]
    return Table(["arm", "against", "networks", "rejected, difference"], rows, title="Arms against each other, paired")
