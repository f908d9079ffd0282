"""What the arms did: their curves, and predicted against realised response."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from patterning_dist.report.blocks import Figures, Note, Section, Table
from patterning_dist.report.figures import arm_style, curves, figure, intervals
from patterning_dist.report.reading import ARM_ORDER, Run, column, in_order
from patterning_dist.report.words import COMPARED, clear, estimate, label, listed, number, unit

THRESHOLD = 0.1  # a prefix-matching score above it counts as a formed induction head


def first_passing(table: pa.Table) -> int | None:
    """First step with prefix_matching above the threshold, None if there is none."""
    for step, value in zip(column(table, "step").tolist(), column(table, "prefix_matching").tolist(), strict=True):
        if value > THRESHOLD:
            return int(step)
    return None


def arms(run: Run, summary: dict[str, Any] | None) -> Section:
    """Section 2: metric curves of all arms with their transition times."""
    section = Section("arms", "The arms, step by step")
    retrained = run.retrained()
    if not retrained:
        section.missing = "No retraining has been run yet."
        return section
    groups = {arm: list(seeds.values()) for arm, seeds in retrained.items()}
    seeds = {arm: [str(seed) for seed in found] for arm, found in retrained.items()}
    steps = (summary or {}).get("transition_steps")
    if not steps:
        steps = {
            arm: [first_passing(t) for t in tables if "prefix_matching" in t.column_names]
            for arm, tables in groups.items()
        }
    drawn = []
    for metric in COMPARED:
        prefix = metric == "prefix_matching"
        svg = curves(groups, metric, THRESHOLD if prefix else None, steps if prefix else None)
        drawn += figure(_passed(steps) if prefix else _ends(groups, metric), svg)
    section.blocks.append(
        Figures(
            drawn,
            legend=[(arm, f"{arm} ({len(found)} seed{'s' * (len(found) != 1)})") for arm, found in groups.items()],
        )
    )
    section.blocks.append(
        Note(
            "Thin lines are single seeds, thick lines their mean; a point on the 0.1 line marks where a seed "
            "passes it. "
            "Axes of losses leave out the first fifth of training, where they would hide the rest.",
            "small",
        )
    )
    ordered = in_order(steps, ARM_ORDER)
    names = max((seeds.get(arm, []) for arm in ordered), key=len, default=[])
    width = max([len(names), *(len(steps[arm]) for arm in ordered)])
    headers = ["arm", *[f"seed {names[i]}" if i < len(names) else f"run {i + 1}" for i in range(width)]]
    rows = [
        [arm, *["not reached" if step is None else number(step, decimals=0) for step in steps[arm]]] for arm in ordered
    ]
    section.blocks.append(
        Table(
            headers,
            [row + [""] * (width + 1 - len(row)) for row in rows],
            "First step with a prefix-matching score above 0.1",
        )
    )
    return section


def _passed(steps: dict[str, list[int | None]]) -> str:
    counts = [
        f"{sum(s is not None for s in steps[arm])} of {len(steps[arm])} {arm}" for arm in in_order(steps, ARM_ORDER)
    ]
    return f"Prefix-matching score passes 0.1 in {listed(counts)} runs"


def _ends(groups: dict[str, list[pa.Table]], metric: str) -> str:
    ends = []
    for arm, tables in groups.items():
        last = [column(t, metric)[-1] for t in tables if metric in t.column_names]
        if last:
            ends.append(f"{arm} {number(sum(last) / len(last), decimals=2)}")
    return f"{label(metric)} ends at {', '.join(ends)} {unit(metric)}"


def response(summary: dict[str, Any] | None, solution: dict[str, Any] | None) -> Section:
    """Section 3: predicted, cross-fitted and realised response of every observable."""
    section = Section("response", "Predicted and realised response")
    if solution is None:
        section.missing = "No weights have been solved yet."
        return section
    solved = solution.get("arms") or {}
    drawn, rows = [], []
    for name in solution.get("observables") or []:
        lines = []
        for arm in in_order(solved, ARM_ORDER):
            entry = solved[arm]
            realised = _realised(summary, arm, name)
            kinds = (
                ("predicted", "open", (entry.get("predicted_response") or {}).get(name)),
                ("cross-fitted", "diamond", (entry.get("cross_fitted_response") or {}).get(name)),
                ("realised", "dot", realised),
            )
            lines += [
                (f"{arm}, {kind}", arm_style(arm), mark, value)
                for kind, mark, value in kinds
                if value and value.get("value") is not None
            ]
            target = (entry.get("target") or {}).get(name)
            rows.append([name, arm, number(target, sign=True), *[estimate(value, sign=True) for _, _, value in kinds]])
        if lines:
            svg = intervals(lines, "change from base (nats)", f"Predicted and realised change of {name}")
            drawn += figure(_agreement(name, solved, summary), svg)
    section.blocks.append(
        Note(
            "The prediction is the linear response of the localised posterior at the checkpoint; what was "
            "realised is the difference from the base arm after retraining from the start. The signs should "
            "agree; the sizes need not. The plain prediction uses the same draws as the solution and is "
            "optimistic; the cross-fitted one solves on half of the chains and predicts with the other half."
        )
    )
    if drawn:
        section.blocks.append(Figures(drawn))
    section.blocks.append(
        Table(
            ["observable", "arm", "target", "predicted", "cross-fitted", "realised"],
            rows,
            "In nats, with 95 % intervals",
        )
    )
    return section


def _realised(summary: dict[str, Any] | None, arm: str, name: str) -> dict[str, Any] | None:
    given = (((summary or {}).get("realised") or {}).get(arm) or {}).get(name)
    return (
        given
        if isinstance(given, dict)
        else (((summary or {}).get("contrasts") or {}).get(f"{arm}-base") or {}).get(name)
    )


def _agreement(name: str, solved: dict[str, Any], summary: dict[str, Any] | None) -> str:
    arms_with: dict[str, list[str]] = {}
    for arm in in_order(solved, ARM_ORDER):
        entry = solved[arm]
        predicted = (entry.get("cross_fitted_response") or entry.get("predicted_response") or {}).get(name)
        realised = _realised(summary, arm, name)
        if not predicted or not realised:
            continue
        side = "rose" if clear(realised) > 0 else "fell"
        if not clear(realised):
            words = "without clear effect"
        elif not clear(predicted):
            words = f"{side} though no clear change was predicted"
        else:
            words = f"{side} as predicted" if clear(predicted) == clear(realised) else f"{side} against the prediction"
        arms_with.setdefault(words, []).append(arm)
    found = [f"{listed(arms)} {words}" for words, arms in arms_with.items()]
    return f"{label(name)}: {', '.join(found)}" if found else label(name)
