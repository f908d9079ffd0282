"""What the arms did: their curves, and predicted, checked and realised response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from patterning_dist.report.blocks import Figures, Note, Section, Table
from patterning_dist.report.figures import arm_style, curves, figure, intervals
from patterning_dist.report.predictions import KINDS, predictions
from patterning_dist.report.reading import ARM_ORDER, Run, column, in_order
from patterning_dist.report.words import Metrics, clear, estimate, listed, number

SCORE, THRESHOLD = "prefix_matching", 0.1  # a score above it counts as a formed induction head
_NO_METRICS = ("step", "seconds")
_MARKS = {"predicted": "open", "cross_fitted": "diamond", "checked": "ring", "window": "ring", "realised": "dot"}
_ABSENT = {
    "retrain": "The experiment file has no section retrain, so no model is trained on weighted data.",
    "solve": "The experiment file has no section solve, so no weights are asked for and no response is predicted.",
}


def first_passing(table: pa.Table) -> int | None:
    """First step with a prefix-matching score above the threshold, None if there is none."""
    for step, value in zip(column(table, "step").tolist(), column(table, SCORE).tolist(), strict=True):
        if value > THRESHOLD:
            return int(step)
    return None


def arms(section: Section, run: Run, summary: Mapping[str, Any], metrics: Metrics) -> None:
    """Metric curves of all arms, with their transition times where heads are scored."""
    retrained = run.retrained()
    if not retrained:
        return run.excuse(section, "No retraining has been run yet.", _ABSENT["retrain"], "retrain")
    groups = {arm: list(seeds.values()) for arm, seeds in retrained.items()}
    steps = _transitions(groups, summary)
    drawn = []
    for metric in _drawn_metrics(groups, metrics):
        scored = metric == SCORE and bool(steps)
        title = _passed(metrics, steps) if scored else _ends(groups, metric, metrics)
        svg = curves(groups, metric, metrics.axis(metric), *((THRESHOLD, steps) if scored else ()))
        drawn += figure(title, svg, metrics.meaning(metric))
    legend = [(arm, f"{arm} ({len(found)} seed{'s' * (len(found) != 1)})") for arm, found in groups.items()]
    words = (
        "Thin lines are single seeds, thick lines their mean. Axes of losses leave out the first fifth of training, "
    )
    words += "where they would hide the rest."
    section.blocks += [Figures(drawn, legend=legend), Note(words, "small")]
    if steps:
        section.blocks.append(_transition_table(steps, retrained))


def _drawn_metrics(groups: Mapping[str, Sequence[pa.Table]], metrics: Metrics) -> list[str]:
    """Described metrics that the trainings have; without a description all of their columns."""
    there = {name for tables in groups.values() for table in tables for name in table.column_names}
    return [name for name in metrics.described if name in there] or sorted(there - set(_NO_METRICS))


def _transitions(groups: Mapping[str, Sequence[pa.Table]], summary: Mapping[str, Any]) -> dict[str, list[int | None]]:
    found = summary.get("transition_steps")
    if found is not None:
        return dict(found)
    scored = {arm: [first_passing(t) for t in tables if SCORE in t.column_names] for arm, tables in groups.items()}
    return {arm: steps for arm, steps in scored.items() if steps}


def _transition_table(steps: Mapping[str, list[int | None]], retrained: Mapping[str, Mapping[int, pa.Table]]) -> Table:
    seeds = list(dict.fromkeys(seed for found in retrained.values() for seed in found))
    rows = []
    for arm in in_order(steps, ARM_ORDER):
        words = ["not reached" if step is None else number(step, decimals=0) for step in steps[arm]]
        reached = dict(zip(retrained.get(arm, ()), words, strict=False))
        rows.append([arm, *(reached.get(seed, "") for seed in seeds)])
    title = f"First step with a prefix-matching score above {THRESHOLD} (points in the figure)"
    return Table(["arm", *(f"seed {seed}" for seed in seeds)], rows, title)


def _passed(metrics: Metrics, steps: Mapping[str, list[int | None]]) -> str:
    counts = [
        f"{sum(s is not None for s in steps[arm])} of {len(steps[arm])} {arm}" for arm in in_order(steps, ARM_ORDER)
    ]
    return f"{metrics.label(SCORE)} passes {THRESHOLD} in {listed(counts)} runs"


def _ends(groups: Mapping[str, Sequence[pa.Table]], metric: str, metrics: Metrics) -> str:
    ends = []
    for arm, tables in groups.items():
        last = [column(t, metric)[-1] for t in tables if metric in t.column_names]
        if last:
            ends.append(f"{arm} {number(sum(last) / len(last), decimals=2)}")
    return f"{metrics.label(metric)} ends at {', '.join(ends)} {metrics.unit(metric)}".strip()


def response(
    section: Section, run: Run, summary: Mapping[str, Any], solution: Mapping[str, Any], metrics: Metrics
) -> None:
    """Predicted, cross-fitted, checked and realised response of every observable."""
    if not solution:
        return run.excuse(section, "No weights have been solved yet.", _ABSENT["solve"], "solve")
    checked = run.json("check/response.json") or {}
    windows = run.json("predict/response.json") or {}
    # Before there is a summary, the solutions stand for the arms.
    found = summary if "predicted" in summary else predictions(solution, checked, windows, {})
    unasked = {kind for kind, content in (("checked", checked), ("window", windows)) if not content}
    kinds = [kind for kind in (*KINDS, "realised") if kind not in unasked]
    shown = in_order({arm for kind in kinds for arm in found.get(kind) or {}}, ARM_ORDER)
    drawn, rows = [], []
    for name in solution.get("observables") or []:
        lines = []
        for arm in shown:
            values = {kind: ((found.get(kind) or {}).get(arm) or {}).get(name) for kind in kinds}
            lines += [
                (f"{arm}, {kind.replace('_', '-')}", arm_style(arm), _MARKS[kind], value)
                for kind, value in values.items()
                if value and value.get("value") is not None
            ]
            rows.append([name, arm, *(estimate(value, sign=True) for value in values.values())])
        if lines:
            svg = intervals(lines, f"change ({metrics.unit(name) or 'its unit'})", f"Responses of {name}")
            drawn += figure(_agreement(name, shown, found, metrics), svg)
    words = (
        "The prediction is the linear response of the localised posterior at the checkpoint; what was realised is the "
        "difference from the plain arm after retraining. The signs should agree; the sizes need not. The plain "
        "prediction uses the same draws as the solution and is optimistic; the cross-fitted one solves on half of the "
        "chains and predicts with the other half."
    )
    if checked:
        words += " Checked is what chains under the weights do, against coupled chains without them."
    if windows:
        words += (
            " Window is what was predicted of the training itself before it was run, on held-out samples that "
            "neither the weights nor the result were taken on."
        )
    section.blocks.append(Note(words))
    for arm, entry in (windows.get("arms") or {}).items():
        if entry.get("outside"):
            section.blocks.append(Note(f"{arm}: outside the window, no prediction: {entry['outside']}.", "small"))
    section.blocks += [Figures(drawn)] if drawn else []
    headers = ["observable", "arm", *(kind.replace("_", "-") for kind in kinds)]
    section.blocks.append(Table(headers, rows, "With 95 % intervals"))
    if checked:
        section.blocks.append(_check_table(checked))
    elif run.leaves_out("check"):
        words = "The experiment file has no section check, so the prediction is not measured again under the weights."
        section.blocks.append(Note(words, "small"))


def _check_table(checked: Mapping[str, Any]) -> Table:
    rows = [
        [strength, name, number(entry.get("predicted"), sign=True), estimate(entry, sign=True)]
        for strength, entries in (checked.get("strengths") or {}).items()
        for name, entry in entries.items()
    ]
    title = f"Chains of {checked.get('subject')} under {checked.get('weights')} weights, at multiples of them"
    return Table(["strength", "observable", "predicted", "checked"], rows, title)


def _agreement(name: str, shown: Sequence[str], found: Mapping[str, Any], metrics: Metrics) -> str:
    arms_with: dict[str, list[str]] = {}
    for arm in shown:
        kinds = {kind: ((found.get(kind) or {}).get(arm) or {}).get(name) for kind in (*KINDS, "realised")}
        predicted, realised = kinds["cross_fitted"] or kinds["predicted"], kinds["realised"]
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
    words = ", ".join(f"{listed(arms)} {words}" for words, arms in arms_with.items())
    return f"{metrics.label(name)}: {words}" if words else metrics.label(name)
