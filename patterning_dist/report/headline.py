"""What was asked and what came out: a row an arm and target, one sentence, and the differences between the arms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from patterning_dist.report.blocks import Figures, Note, Section, Table
from patterning_dist.report.figures import arm_style, figure, intervals
from patterning_dist.report.reading import ARM_ORDER, Run, in_order, interval_of
from patterning_dist.report.words import Metrics, clear, estimate, listed, number
from patterning_dist.response.contrast import parts_of

Contrasts = Mapping[str, Mapping[str, Mapping[str, Any]]]  # arm -> other -> metric -> estimate
_DIRECTIONS = {"up": "up", "down": "down", "hold": "unmoved"}
_SOURCES = {
    "halving": "the window in half its segments",
    "model": "what the window leaves out",
    "sequences": "held-out samples",
}


def headline_table(rows: Sequence[Mapping[str, Any]], metrics: Metrics) -> tuple[Table, list[str]]:
    """A row for every arm and target, with what was asked and came out, and why something is not there.

    What no row has anything of is no column but a reason, unless that is a window that was left.
    """
    cells, reasons = [], dict[str, int]()
    kinds = {"solved": "solved for", "predicted": "predicted", "checked": "checked", "realised": "realised"}
    empty = [kind for kind in kinds if all(": " not in row[kind].get("missing", ": ") for row in rows)]
    told_once = [f"Not {kind}: {'; '.join(dict.fromkeys(row[kind]['missing'] for row in rows))}." for kind in empty]

    def described(value: Mapping[str, Any]) -> str:
        if "missing" not in value:
            return _in_words(value)
        head, colon, _ = value["missing"].partition(": ")
        return f"{head if colon else '–'} ({reasons.setdefault(value['missing'], len(reasons) + 1)})"

    for row in rows:
        name, asked, share = metrics.in_sentence(row["target"]), row["asked"], row["solved"].get("share")
        parts = [f"{metrics.term(part)} {_latest(found)}" for part, found in row["parts"].items() if found]
        cells.append(
            [
                row["arm"],
                f"{name} {_DIRECTIONS[asked['direction']]}" if asked else f"nothing of {name}",
                *(
                    described(row[kind]) + (f" at share {number(share, 2)}" if share and kind == "solved" else "")
                    for kind in kinds
                    if kind not in empty
                ),
                ", ".join(parts) or "–",
                _latest(row["cost"]),
            ]
        )
    columns = [words for kind, words in kinds.items() if kind not in empty]
    headers = ["arm", "asked", *columns, "of which", "cost in overall loss"]
    return Table(headers, cells), [f"({number}) {reason}." for reason, number in reasons.items()] + told_once


def _latest(found: Mapping[str, Any]) -> str:
    """What was realised; else what was checked or predicted, and that it is no more."""
    if "realised" in found:
        return _in_words(found["realised"])
    kind = next((kind for kind in ("checked", "predicted") if kind in found), None)
    return f"{_in_words(found[kind])} ({kind})" if kind else "–"


def _in_words(value: Mapping[str, Any]) -> str:
    return estimate(value, sign=True) + ("" if interval_of(value) else " (no interval)")


def _pairs(contrasts: Contrasts) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(arm, other, differences), arms in their order."""
    for arm in in_order(contrasts, ARM_ORDER):
        for other, values in contrasts[arm].items():
            yield arm, other, values


def _verdict(contrasts: Contrasts, solution: Mapping[str, Any], summary: Mapping[str, Any], metrics: Metrics) -> str:
    """An arm on the metric that its weights were solved for most, and on what they were to hold: the numbers alone."""
    solved, arms = solution.get("arms") or {}, summary.get("arms") or {}
    sentences: list[str] = []
    for arm in in_order(contrasts, ARM_ORDER):
        (other, values), *controls = contrasts[arm].items()
        target = (solved.get((arms.get(arm) or {}).get("weights") or arm) or {}).get("target") or {}
        aimed = {name: value for name, value in target.items() if value and name in values}
        if target and not aimed:
            rows = (row for row in summary.get("headline") or [] if row["arm"] == arm and row["asked"] is None)
            aimed = {row["target"]: 0.0 for row in rows if row["target"] in values}
        if not aimed:
            continue
        metric = max(aimed, key=lambda name: abs(aimed[name]))
        weights = f"the {arm} weights" + ("" if aimed[metric] else ", of which that was not asked,")
        change = f"With {weights} training {_change(metric, values[metric], metrics)} compared with {other}"
        if terms := parts_of(metric, values):
            change += (
                f", of which {listed([f'{metrics.term(name)} {estimate(values[name], sign=True)}' for name in terms])}"
            )
        against = {name: values[metric] for name, values in controls if metric in values}
        sentences.append(", ".join([change, *_judged(aimed[metric], values[metric], against)]) + ".")
        moved = [name for name, value in target.items() if value == 0 and name in values and clear(values[name])]
        if moved:
            changes = listed([_change(name, values[name], metrics) for name in moved])
            sentences.append(f"What was to stay unmoved was not: training {changes}.")
    return " ".join(sentences)


def _judged(wanted: float, found: dict[str, Any], controls: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    if wanted and clear(found):
        as_asked = clear(found) == (1 if wanted > 0 else -1)
        yield "as asked" if as_asked else "which is the opposite of what was asked"
    for other, against in controls.items():
        tail = "and the same holds" if clear(against) == clear(found) else "and it differs"
        if not clear(against):
            tail = "but there is no clear difference"
        yield f"{tail} against {other} ({estimate(against, sign=True)})"


def _change(metric: str, value: dict[str, Any], metrics: Metrics) -> str:
    if interval_of(value) is None:
        return f"moved {metrics.effect(metric, value).replace(' moved by', ' by')}"
    return metrics.effect(metric, value) if clear(value) else f"had {metrics.effect(metric, value)}"


def _forest_title(metric: str, contrasts: Contrasts, metrics: Metrics) -> str:
    found = []
    for arm, other, values in _pairs(contrasts):
        if metric in values:
            side = clear(values[metric])
            found.append(f"{arm} {'above' if side > 0 else 'below'} {other}" if side else f"{arm} ≈ {other}")
    return f"{metrics.label(metric)}: {', '.join(found)}"


def headline(
    section: Section, run: Run, summary: Mapping[str, Any], solution: Mapping[str, Any], metrics: Metrics
) -> None:
    """One row an arm and target, one sentence, contrasts as forest plots."""
    rows, contrasts = summary.get("headline") or [], summary.get("contrasts") or {}
    if not rows and not contrasts:
        absent = "This experiment measures; it asks for no weights and trains no arms."
        missing = "No weights have been solved and no arms compared."
        return run.excuse(section, missing, absent, "solve", "retrain")
    if rows:
        table, reasons = headline_table(rows, metrics)
        section.blocks += [table, Note(" ".join([*reasons, _covered(rows)]), "small")]
    if verdict := _verdict(contrasts, solution, summary, metrics):
        section.blocks.append(Note(verdict, "lead"))
    if contrasts:
        section.blocks += _differences(contrasts, metrics)
    elif run.leaves_out("retrain"):
        section.blocks.append(Note("The experiment file has no section retrain: no arms are compared.", "small"))
    else:
        section.blocks.append(Note("The comparison of the arms has not been run yet.", "small"))


def _covered(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the 95 % intervals of every column cover, as the estimates themselves say."""
    found = {
        kind: list(dict.fromkeys(name for row in rows for name in row[kind].get("covers") or ()))
        for kind in ("solved", "predicted", "checked", "realised")
    }
    words = [f"{kind} {listed([_SOURCES.get(name, name) for name in names])}" for kind, names in found.items() if names]
    return (
        f"95 % intervals cover: {'; '.join(words) or 'nothing'}. Solved for is the linear response at the checkpoint, "
        "on the held-out samples that the observables are made of; predicted and checked are on other ones, realised "
        "and the cost on a third set."
    )


def _differences(contrasts: Contrasts, metrics: Metrics) -> list[Any]:
    pairs = list(_pairs(contrasts))
    there = dict.fromkeys(name for _, _, values in pairs for name in values)
    names = sorted(there, key=lambda name: list(metrics.described).index(name) if name in metrics.described else 999)
    drawn = []
    for metric in names:
        if ":" in metric:
            continue  # terms of observables are drawn beside what was predicted of them
        rows = [(f"{a} − {b}", arm_style(a), "dot", values[metric]) for a, b, values in pairs if metric in values]
        label = f"difference ({metrics.unit(metric)})" if metrics.unit(metric) else "difference"
        plot = intervals(rows, label, f"Differences between arms in {metrics.label(metric)}")
        drawn += figure(_forest_title(metric, contrasts, metrics), plot, metrics.meaning(metric))
    cells = [[metrics.label(metric), *(_cell(values.get(metric)) for _, _, values in pairs)] for metric in names]
    words = (
        "Large points are differences of means over seeds with their 95 % intervals, which cover seeds, and held-out "
        "samples too where the quantity is an observable; small points are single seeds. "
        "“≈” means that the interval holds zero: no clear effect."
    )
    headers = ["", *(f"{a} − {b}" for a, b, _ in pairs)]
    return [Figures(drawn), Note(words, "small"), Table(headers, cells, "Differences between arms")]


def _cell(value: dict[str, Any] | None) -> str:
    if not value:
        return "–"
    return f"{'≈ ' if interval_of(value) and not clear(value) else ''}{_in_words(value)}"
