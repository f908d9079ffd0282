"""When the trainings formed an induction head: first steps, curves of the runs without one, and the arms compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from patterning_dist.report.blocks import Block, Figures, Note, Table
from patterning_dist.report.figures import arm_style, figure
from patterning_dist.report.reading import ARM_ORDER, column, in_order
from patterning_dist.report.svg import Plot
from patterning_dist.report.words import Metrics, listed, number

SCORE, THRESHOLD = "prefix_matching", 0.1  # a score above it counts as a formed induction head


def first_passing(table: pa.Table) -> int | None:
    """First step with a prefix-matching score above the threshold, None if there is none."""
    for step, value in zip(column(table, "step").tolist(), column(table, SCORE).tolist(), strict=True):
        if value > THRESHOLD:
            return int(step)
    return None


def transitions(groups: Mapping[str, Sequence[pa.Table]], summary: Mapping[str, Any]) -> dict[str, list[int | None]]:
    """Arm -> first steps as the summary has them, or before there is one those of the curves."""
    found = summary.get("transition_steps")
    if found is not None:
        return dict(found)
    scored = {arm: [first_passing(t) for t in tables if SCORE in t.column_names] for arm, tables in groups.items()}
    return {arm: steps for arm, steps in scored.items() if steps}


def transition_table(steps: Mapping[str, list[int | None]], retrained: Mapping[str, Mapping[int, pa.Table]]) -> Table:
    """First steps, a row an arm and a column a seed."""
    seeds = list(dict.fromkeys(seed for found in retrained.values() for seed in found))
    rows = []
    for arm in in_order(steps, ARM_ORDER):
        words = ["not reached" if step is None else number(step, decimals=0) for step in steps[arm]]
        reached = dict(zip(retrained.get(arm, ()), words, strict=False))
        rows.append([arm, *(reached.get(seed, "") for seed in seeds)])
    title = f"First step with a prefix-matching score above {THRESHOLD} (points in the figure)"
    return Table(["arm", *(f"seed {seed}" for seed in seeds)], rows, title)


def passed(metrics: Metrics, steps: Mapping[str, list[int | None]]) -> str:
    """How many runs of every arm formed a head."""
    counts = [
        f"{sum(s is not None for s in steps[arm])} of {len(steps[arm])} {arm}" for arm in in_order(steps, ARM_ORDER)
    ]
    return f"{metrics.label(SCORE)} passes {THRESHOLD} in {listed(counts)} runs"


def time_to_circuit(found: Mapping[str, Any]) -> list[Block]:
    """Kaplan-Meier curves, a table of medians and comparisons, and what they cover; nothing where no arm is scored.

    Args:
        found: ``time_to_event`` of summary.json.
    """
    if not found:
        return []
    arms = in_order(found, ARM_ORDER)
    medians = [f"{arm} {_step(found[arm]['median'])}" for arm in arms]
    title = f"Step by which half of the runs have an induction head: {', '.join(medians)}"
    meaning = "Kaplan–Meier estimate; rings are runs that ended without one."
    words = (
        f"The event is the first evaluation with a prefix-matching score above {THRESHOLD}, and runs without it are "
        "censored at their last step; hazard ratios above 1 mean that the arm forms the head earlier, and all 95 % "
        "intervals and the log-rank test cover seeds alone, by laws for many independent runs."
    )
    drawn = Figures(figure(title, _curves(found, arms), meaning), legend=[(arm_style(arm), arm) for arm in arms])
    return [drawn, _comparisons(found, arms), Note(words, "small")]


def _curves(found: Mapping[str, Any], arms: Sequence[str]) -> Markup:
    ends = {arm: max([0, *found[arm]["not_reached"]["times"], *found[arm]["censored_at"]]) for arm in arms}
    plot = Plot((0, max(1, *ends.values())), (0, 1.05), x_label="training step", y_label="share of runs without a head")
    for arm in arms:
        style, curve = arm_style(arm), found[arm]["not_reached"]
        shares = [1.0, *curve["share"]]
        steps = np.repeat([0.0, *curve["times"], ends[arm]], 2)[1:-1]
        plot.curve(steps, np.repeat(shares, 2), f"{style} thick")
        for step, share in zip(curve["times"], curve["share"], strict=True):
            plot.dot(step, share, "ghost", 6, f"{arm}, step {number(step)}: {number(share, 2)} of the runs without")
        for step in found[arm]["censored_at"]:
            share = shares[np.searchsorted(curve["times"], step, side="right")]
            plot.dot(step, share, f"{style} hollow", 4, f"{arm}: a run ended at step {number(step)} without")
    return plot.svg(f"Share of runs without an induction head against the training step, for {', '.join(arms)}")


def _comparisons(found: Mapping[str, Any], arms: Sequence[str]) -> Table:
    others = list(dict.fromkeys(other for arm in arms for other in found[arm]["against"]))
    rows = []
    for arm in arms:
        entry, median = found[arm], _step(found[arm]["median"])
        if entry["median"] is not None:
            median += "\u00a0[{},\u00a0{}]".format(*map(_step, entry["median_interval"]))
        compared = [entry["against"].get(other) for other in others]
        cells = [words for one in compared for words in (_in_words(one) if one else ("–", "–"))]
        rows.append([arm, f"{entry['events']} of {entry['runs']}", median, *cells])
    headers = [f"{what} against {other}" for other in others for what in ("log-rank", "hazard ratio")]
    return Table(["arm", "runs with a head", "median step", *headers], rows, "Time to an induction head")


def _step(step: float | None) -> str:
    return "not reached" if step is None else number(step, decimals=0)


def _in_words(against: Mapping[str, Any]) -> tuple[str, str]:
    """The test and the hazard ratio, which has one end only where all events of one arm come first."""
    test = "–" if against["p"] is None else f"χ² {number(against['chi2'])}, p = {number(against['p'], 2)}"
    ratio = against["hazard_ratio"]
    if ratio["interval"] is None:
        return test, "–"
    low, high = (number(end, 2) for end in ratio["interval"])
    if ratio["value"]:
        return test, f"{number(ratio['value'], 2)}\u00a0[{low},\u00a0{high}]"
    return test, f"above {low}" if ratio["value"] is None else f"below {high}"
