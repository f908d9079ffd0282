"""The page of the parentheses experiment: which rule the networks of every arm follow, and why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patterning_dist.experiments.two_rules.page.arms import arms_section
from patterning_dist.experiments.two_rules.page.solutions import check_section, llc_section, rounds_section
from patterning_dist.report.blocks import Note, Section, Table
from patterning_dist.report.page import when
from patterning_dist.report.words import duration, number
from patterning_dist.report.writing import write_page


def write_parentheses_page(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the page of a finished run from its summary.json."""
    cost = Table(["stage", "time"], [[stage, duration(value)] for stage, value in summary["seconds"].items()])
    write_page(
        path,
        kind="Choosing the algorithm",
        name=summary["name"],
        created=when(summary["created"]),
        status="all stages run",
        warnings=list(summary["warnings"]),
        sections=[
            arms_section(summary["arms"], summary["contrasts"]),
            rounds_section(summary["rounds"]),
            llc_section(summary["llc"], summary["reliability"]),
            check_section(summary["check"]),
            _strings(summary["strings"]),
            Section("cost", "Cost", [cost]),
        ],
    )


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
