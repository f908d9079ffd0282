"""What was asked and what came out: one honest sentence and the differences between the arms."""

from __future__ import annotations

from typing import Any

from patterning_dist.report.blocks import Cards, Figures, Note, Points, Section, Table
from patterning_dist.report.figures import arm_style, figure, intervals
from patterning_dist.report.reading import in_order, interval_of
from patterning_dist.report.words import (
    COMPARED,
    METRICS,
    clear,
    effect,
    estimate,
    in_sentence,
    label,
    listed,
    number,
    unit,
)

CONTRASTS = ("plus-base", "plus-permuted", "minus-base", "permuted-base")


def _asked(solution: dict[str, Any] | None) -> list[tuple[str, str]]:
    rows = []
    for arm, entry in ((solution or {}).get("arms") or {}).items():
        target = entry.get("target") or {}
        wanted = [
            f"{in_sentence(name)} {'up' if value > 0 else 'down'} by {number(abs(value))} nats"
            if value
            else f"{in_sentence(name)} unmoved"
            for name, value in target.items()
        ]
        if wanted:
            rows.append((arm, f"{arm.capitalize()} weights were solved for {listed(wanted)} (to first order)."))
    return rows


def _verdict(contrasts: dict[str, Any], solution: dict[str, Any] | None) -> str:
    """A sentence or two on the targeted metric (else the prefix-matching score), from the numbers alone."""
    target = (((solution or {}).get("arms") or {}).get("plus") or {}).get("target") or {}
    aimed = {name: value for name, value in target.items() if value and name in contrasts.get("plus-base", {})}
    metric = max(aimed, key=lambda name: abs(aimed[name])) if aimed else "prefix_matching"
    against = {other: contrasts.get(f"plus-{other}", {}).get(metric) for other in ("base", "permuted")}
    if against["base"] is None:
        return ""
    parts = [f"Training with the plus weights {_change(metric, against['base'])} compared with plain training"]
    wanted = aimed.get(metric, 0.0)
    if clear(against["base"]) and wanted:
        parts.append(
            "as asked"
            if clear(against["base"]) == (1 if wanted > 0 else -1)
            else "which is the opposite of what was asked"
        )
    if against["permuted"] is not None:
        same = clear(against["permuted"]) and clear(against["permuted"]) == clear(against["base"])
        tail = "and the same holds" if same else "and it differs"
        if not clear(against["permuted"]):
            tail = "but there is no clear difference"
        parts.append(
            f"{tail} against the same weights permuted over tokens ({estimate(against['permuted'], sign=True)})"
        )
    sentence = ", ".join(parts) + "."
    minus = contrasts.get("minus-base", {}).get(metric)
    return f"{sentence} With the minus weights training {_change(metric, minus)}." if minus else sentence


def _change(metric: str, value: dict[str, Any]) -> str:
    if interval_of(value) is None:
        return f"moved {effect(metric, value).replace(' moved by', ' by')}"
    return effect(metric, value) if clear(value) else f"had {effect(metric, value)}"


def _forest_title(metric: str, contrasts: dict[str, Any]) -> str:
    found = []
    for name, values in contrasts.items():
        if metric in values and name in CONTRASTS[:3]:
            arm, other = name.split("-", 1)
            side = clear(values[metric])
            found.append(f"{arm} {'above' if side > 0 else 'below'} {other}" if side else f"{arm} ≈ {other}")
    return f"{label(metric)}: {', '.join(found)}" if found else label(metric)


def headline(summary: dict[str, Any] | None, solution: dict[str, Any] | None) -> Section:
    """Section 1: targets, contrasts as forest plots, one sentence."""
    section = Section("headline", "What was asked, what came out")
    asked = _asked(solution)
    contrasts = (summary or {}).get("contrasts") or {}
    contrasts = {name: contrasts[name] for name in in_order(contrasts, CONTRASTS)}
    if not asked and not contrasts:
        section.missing = "No weights have been solved and no arms compared."
        return section
    verdict = _verdict(contrasts, solution)
    if verdict:
        section.blocks.append(Note(verdict, "lead"))
    cards = [
        (entry["name"], estimate(entry).split("\u00a0[")[0], _card_detail(entry), entry.get("what") or "")
        for entry in (summary or {}).get("headline") or []
        if entry.get("featured", True)
    ]
    if cards:
        section.blocks.append(Cards(cards))
    if asked:
        section.blocks.append(Points(asked))
    drawn = []
    metrics = [metric for metric in COMPARED if any(metric in values for values in contrasts.values())]
    for metric in metrics:
        rows = [
            (name.replace("-", " − "), arm_style(name.split("-", 1)[0]), "dot", values[metric])
            for name, values in contrasts.items()
            if metric in values
        ]
        plot = intervals(rows, f"difference ({unit(metric)})", f"Differences between arms in {label(metric)}")
        drawn += figure(_forest_title(metric, contrasts), plot, METRICS[metric][2].capitalize() + ".")
    if drawn:
        section.blocks.append(Figures(drawn))
        section.blocks.append(
            Note(
                "Large points are differences of means over seeds with their 95 % intervals; small points "
                "are single seeds. "
                "“≈” means that the interval holds zero: no clear effect.",
                "small",
            )
        )
        cells = [
            [name.replace("-", " − "), *[_cell(values.get(metric)) for metric in metrics]]
            for name, values in contrasts.items()
        ]
        section.blocks.append(
            Table(
                ["arms", *[label(metric) for metric in metrics]],
                cells,
                "Differences between arms, with 95 % intervals",
            )
        )
    else:
        section.blocks.append(Note("The comparison of the arms has not been run yet.", "small"))
    return section


def _cell(value: dict[str, Any] | None) -> str:
    if not value:
        return "–"
    if interval_of(value) is None:
        return f"{estimate(value, sign=True)} (no interval)"
    return f"{'' if clear(value) else '≈ '}{estimate(value, sign=True)}"


def _card_detail(entry: dict[str, Any]) -> str:
    _, bracket, ends = estimate(entry).partition("[")
    return f"{bracket}{ends} {entry.get('unit') or ''}".strip()
