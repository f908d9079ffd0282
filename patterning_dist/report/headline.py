"""What was asked and what came out: one honest sentence and the differences between the arms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from patterning_dist.report.blocks import Cards, Figures, Note, Points, Section, Table
from patterning_dist.report.figures import arm_style, figure, intervals
from patterning_dist.report.reading import ARM_ORDER, Run, in_order, interval_of
from patterning_dist.report.words import Metrics, clear, estimate, listed, number

Contrasts = Mapping[str, Mapping[str, Mapping[str, Any]]]  # arm -> other -> metric -> estimate


def _asked(solution: Mapping[str, Any], metrics: Metrics) -> list[tuple[str, str]]:
    rows = []
    for arm, entry in (solution.get("arms") or {}).items():
        wanted = [
            f"{metrics.in_sentence(name)} {'up' if value > 0 else 'down'} by {number(abs(value))} {metrics.unit(name)}"
            if value
            else f"{metrics.in_sentence(name)} unmoved"
            for name, value in (entry.get("target") or {}).items()
        ]
        if wanted:
            wanted = [words.strip() for words in wanted]
            rows.append((arm, f"{arm.capitalize()} weights were solved for {listed(wanted)} (to first order)."))
    return rows


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
        if not aimed:
            continue
        metric = max(aimed, key=lambda name: abs(aimed[name]))
        change = f"With the {arm} weights training {_change(metric, values[metric], metrics)} compared with {other}"
        against = {name: values[metric] for name, values in controls if metric in values}
        sentences.append(", ".join([change, *_judged(aimed[metric], values[metric], against)]) + ".")
        moved = [name for name, value in target.items() if value == 0 and name in values and clear(values[name])]
        if moved:
            changes = listed([_change(name, values[name], metrics) for name in moved])
            sentences.append(f"What was to stay unmoved was not: training {changes}.")
    return " ".join(sentences)


def _judged(wanted: float, found: dict[str, Any], controls: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    if clear(found):
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
    """Targets, contrasts as forest plots, one sentence."""
    asked, contrasts = _asked(solution, metrics), summary.get("contrasts") or {}
    if not asked and not contrasts:
        absent = "This experiment measures; it asks for no weights and trains no arms."
        missing = "No weights have been solved and no arms compared."
        return run.excuse(section, missing, absent, "solve", "retrain")
    if verdict := _verdict(contrasts, solution, summary, metrics):
        section.blocks.append(Note(verdict, "lead"))
    cards = [
        (entry["name"], estimate(entry).split("\u00a0[")[0], _card_detail(entry), entry.get("what") or "")
        for entry in summary.get("headline") or []
        if entry.get("featured", True)
    ]
    section.blocks += [Cards(cards)] if cards else []
    section.blocks += [Points(asked)] if asked else []
    if contrasts:
        section.blocks += _differences(contrasts, metrics)
    elif run.leaves_out("retrain"):
        section.blocks.append(Note("The experiment file has no section retrain: no arms are compared.", "small"))
    else:
        section.blocks.append(Note("The comparison of the arms has not been run yet.", "small"))


def _differences(contrasts: Contrasts, metrics: Metrics) -> list[Any]:
    pairs = list(_pairs(contrasts))
    there = dict.fromkeys(name for _, _, values in pairs for name in values)
    names = sorted(there, key=lambda name: list(metrics.described).index(name) if name in metrics.described else 999)
    drawn = []
    for metric in names:
        rows = [(f"{a} − {b}", arm_style(a), "dot", values[metric]) for a, b, values in pairs if metric in values]
        label = f"difference ({metrics.unit(metric)})" if metrics.unit(metric) else "difference"
        plot = intervals(rows, label, f"Differences between arms in {metrics.label(metric)}")
        drawn += figure(_forest_title(metric, contrasts, metrics), plot, metrics.meaning(metric))
    cells = [[f"{a} − {b}", *(_cell(values.get(metric)) for metric in names)] for a, b, values in pairs]
    words = (
        "Large points are differences of means over seeds with their 95 % intervals; small points are single seeds. "
        "“≈” means that the interval holds zero: no clear effect."
    )
    headers = ["arms", *(metrics.label(metric) for metric in names)]
    return [Figures(drawn), Note(words, "small"), Table(headers, cells, "Differences between arms")]


def _cell(value: dict[str, Any] | None) -> str:
    if not value:
        return "–"
    if interval_of(value) is None:
        return f"{estimate(value, sign=True)} (no interval)"
    return f"{'' if clear(value) else '≈ '}{estimate(value, sign=True)}"


def _card_detail(entry: dict[str, Any]) -> str:
    _, bracket, ends = estimate(entry).partition("[")
    return f"{bracket}{ends} {entry.get('unit') or ''}".strip()
