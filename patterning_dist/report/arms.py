"""What the arms did: their curves, and predicted, checked and realised responses side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from patterning_dist.report.ablations import ablated_heads
from patterning_dist.report.blocks import Figures, Note, Section, Table
from patterning_dist.report.checked import checks
from patterning_dist.report.figures import arm_style, curves, figure, intervals
from patterning_dist.report.predictions import COVERS, predictions
from patterning_dist.report.reading import ARM_ORDER, Run, column, in_order
from patterning_dist.report.transitions import SCORE, THRESHOLD, passed, time_to_circuit, transition_table, transitions
from patterning_dist.report.words import Metrics, clear, estimate, listed, number

_NO_METRICS = ("step", "seconds")
_MARKS = {"solved": "open", "cross_fitted": "open", "predicted": "diamond", "checked": "ring", "realised": "dot"}
_ABSENT = {
    "retrain": "The experiment file has no section retrain, so no model is trained on weighted data.",
    "solve": "The experiment file has no section solve, so no weights are asked for and no response is predicted.",
}


def arms(section: Section, run: Run, summary: Mapping[str, Any], metrics: Metrics) -> None:
    """Metric curves of all arms, with their transition times where heads are scored."""
    retrained = run.retrained(summary)
    if not retrained:
        return run.excuse(section, "No retraining has been run yet.", _ABSENT["retrain"], "retrain")
    groups = {arm: list(seeds.values()) for arm, seeds in retrained.items()}
    steps = transitions(groups, summary)
    drawn = []
    for metric in _drawn_metrics(groups, metrics):
        scored = metric == SCORE and bool(steps)
        title = passed(metrics, steps) if scored else _ends(groups, metric, metrics)
        svg = curves(groups, metric, metrics.axis(metric), *((THRESHOLD, steps) if scored else ()))
        drawn += figure(title, svg, metrics.meaning(metric))
    legend = [(arm_style(arm), f"{arm} ({len(found)} seed{'s' * (len(found) != 1)})") for arm, found in groups.items()]
    words = (
        "Thin lines are single seeds, thick lines their mean. Axes of losses leave out the first fifth of training, "
    )
    words += "where they would hide the rest."
    section.blocks += [Figures(drawn, legend=legend), Note(words, "small")]
    if steps:
        section.blocks.append(transition_table(steps, retrained))
    section.blocks += time_to_circuit(summary.get("time_to_event") or {})
    section.blocks += ablated_heads(summary.get("head_ablations") or {})


def _drawn_metrics(groups: Mapping[str, Sequence[pa.Table]], metrics: Metrics) -> list[str]:
    """Described metrics that the trainings have; without a description all of their columns."""
    there = {name for tables in groups.values() for table in tables for name in table.column_names}
    return [name for name in metrics.described if name in there] or sorted(there - set(_NO_METRICS))


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
    """Solved for, predicted, checked and realised side by side: a figure an arm, and a table."""
    checked = run.json("check/response.json") or {}
    windows = run.json("predict/response.json") or {}
    if not solution and not windows:
        return run.excuse(section, "No weights have been solved yet.", _ABSENT["solve"], "solve")
    # Before there is a summary, the solutions stand for the arms.
    found = summary if "solved" in summary else predictions(solution, checked, windows, {})
    kinds = [kind for kind in (*COVERS, "realised") if found.get(kind)]
    drawn, rows = [], []
    for arm in in_order({arm for kind in kinds for arm in found[kind]}, ARM_ORDER):
        by_unit: dict[str, list[tuple[str, str, str, dict[str, Any]]]] = {}
        names = dict.fromkeys(name for kind in kinds for name in found[kind].get(arm) or ())
        for name in names:
            values = {kind: (found[kind].get(arm) or {}).get(name) for kind in kinds}
            there = {kind: v for kind, v in values.items() if v and v.get("value") is not None}
            labels = [kind.replace("_", "-") for kind in there]
            labels[:1] = [f"{metrics.term(name)}: {label}" for label in labels[:1]]
            by_unit.setdefault(metrics.unit(name), []).extend(
                (label, arm_style(arm), _MARKS[kind], there[kind]) for label, kind in zip(labels, there, strict=True)
            )
            rows.append([arm, name, *(estimate(value, sign=True) for value in values.values())])
        for unit, lines in by_unit.items():
            svg = (
                intervals(lines, f"change ({unit or 'its unit'})", f"Responses of {arm}", row_height=22)
                if lines
                else None
            )
            drawn += figure(_agreement(arm, names, found, metrics), svg)
    words = (
        "Solved for is the linear response of the localised posterior at the checkpoint, on the held-out samples that "
        "the observables are made of and on the draws that were solved on, which makes it optimistic; cross-fitted "
        "solves on half of the chains and takes the other half. Predicted is what the window of the training comes to, "
        "checked what chains under the weights do against coupled chains without them, both on other held-out samples; "
        "realised is the difference from the plain arm after retraining, on a third set. Where an observable is a "
        "difference, its terms follow it."
    )
    section.blocks.append(Note(words))
    for arm, entry in (windows.get("arms") or {}).items():
        if entry.get("outside"):
            section.blocks.append(Note(f"{arm}: outside the window, no prediction: {entry['outside']}.", "small"))
    if rows_of_metrics := [
        [metrics.label(name), arm, estimate(value, sign=True)]
        for arm, entry in (windows.get("arms") or {}).items()
        for name, value in (entry.get("metrics") or {}).items()
    ]:
        title = (
            "Metrics where the windows lead, less those of equal weights, of the very samples that trainings report "
            "them of: the 95 % interval is of other data orders, of what half of the segments would change, and of a "
            "tenth of the value"
        )
        section.blocks.append(Table(["metric", "arm", "predicted"], rows_of_metrics, title))
    section.blocks += [Figures(drawn)] if drawn else []
    headers = ["arm", "observable", *(kind.replace("_", "-") for kind in kinds)]
    section.blocks.append(Table(headers, rows, "With 95 % intervals"))
    if checked:
        section.blocks += checks(checked, metrics)
    elif run.leaves_out("check"):
        words = "The experiment file has no section check, so the prediction is not measured again under the weights."
        section.blocks.append(Note(words, "small"))


def _agreement(arm: str, names: Iterable[str], found: Mapping[str, Any], metrics: Metrics) -> str:
    """Which way every observable went, and whether that was predicted."""
    with_words: dict[str, list[str]] = {}
    for name in (name for name in names if ":" not in name):
        kinds = {kind: ((found.get(kind) or {}).get(arm) or {}).get(name) for kind in (*COVERS, "realised")}
        predicted = kinds["predicted"] or kinds["cross_fitted"] or kinds["solved"]
        realised = kinds["realised"]
        if not predicted or not realised:
            continue
        side = "rose" if clear(realised) > 0 else "fell"
        if not clear(realised):
            words = "without clear effect"
        elif not clear(predicted):
            words = f"{side} though no clear change was predicted"
        else:
            words = f"{side} as predicted" if clear(predicted) == clear(realised) else f"{side} against the prediction"
        with_words.setdefault(words, []).append(metrics.in_sentence(name))
    words = ", ".join(f"{listed(names)} {words}" for words, names in with_words.items())
    return f"{arm.capitalize()}: {words}" if words else arm.capitalize()
