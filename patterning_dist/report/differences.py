"""Arms against each other: differences and ratios as forest plots and a table, and shares of an oracle's effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from patterning_dist.report.blocks import Block, Figures, Note, Table
from patterning_dist.report.figures import arm_style, figure, intervals
from patterning_dist.report.reading import ARM_ORDER, in_order, interval_of
from patterning_dist.report.words import Metrics, change, clear, estimate, times

Contrasts = Mapping[str, Mapping[str, Mapping[str, Any]]]  # arm -> other -> metric -> estimate
Shares = Mapping[str, Mapping[str, Mapping[str, Any]]]  # oracle -> arm -> metric -> estimate


def in_words(value: Mapping[str, Any]) -> str:
    """A difference with its sign, and that it has no interval where it has none."""
    return estimate(value, sign=True) + ("" if interval_of(value) else " (no interval)")


def factors(contrasts: Contrasts, shares: Shares, metrics: Metrics) -> list[str]:
    """A line for every arm and metric that is compared by ratios: those, and the shares of the oracles' effects."""
    found = []
    for arm in in_order(contrasts, ARM_ORDER):
        ratios: dict[str, list[str]] = {}
        for other, values in contrasts[arm].items():
            for metric, value in values.items():
                if value.get("ratio"):
                    ratios.setdefault(metric, []).append(f"{times(value['ratio'])} against {other}")
        for metric, words in ratios.items():
            for oracle, arms in shares.items():
                share = arms.get(arm, {}).get(metric)
                if share and share["value"] is not None:
                    words.append(f"{estimate(share)} of the effect of {oracle}")
            found.append(f"{arm}: {metrics.in_sentence(metric)} {', '.join(words)}")
    return found


def differences(contrasts: Contrasts, metrics: Metrics) -> list[Block]:
    """A forest plot for every metric and observable, and all of them as a table."""
    pairs = list(_pairs(contrasts))
    drawn = []
    for metric in (names := _names([values for _, _, values in pairs], metrics)):
        if ":" in metric:
            continue  # terms of observables are drawn beside what was predicted of them
        rows = [(a, b, values[metric]) for a, b, values in pairs if metric in values]
        ratios = all(value.get("ratio") for _, _, value in rows)
        what, sign = ("ratio", "/") if ratios else ("difference", "−")
        plot = intervals(
            [(f"{a} {sign} {b}", arm_style(a), "dot", value["ratio"] if ratios else value) for a, b, value in rows],
            f"{what} ({metrics.unit(metric)})" if metrics.unit(metric) and not ratios else what,
            f"{what.capitalize()}s between arms in {metrics.label(metric)}",
            ratios=ratios,
        )
        drawn += figure(_forest_title(metric, contrasts, metrics), plot, metrics.meaning(metric))
    cells = [[metrics.label(metric), *(_cell(values.get(metric)) for _, _, values in pairs)] for metric in names]
    words = (
        "Large points are differences of means over seeds with their 95 % intervals, which cover seeds, and held-out "
        "samples too where the quantity is an observable; small points are single seeds. Of what grows by factors they "
        "are ratios, geometric means over shared seeds. “≈” means that the interval holds zero, or one if it is of a "
        "ratio: no clear effect."
    )
    headers = ["", *(f"{a} − {b}" for a, b, _ in pairs)]
    return [Figures(drawn), Note(words, "small"), Table(headers, cells, "Differences between arms")]


def oracle_table(shares: Shares, metrics: Metrics) -> list[Block]:
    """What part of an oracle's effect each other arm has, a table an oracle."""
    found: list[Block] = []
    for oracle, by_arm in shares.items():
        arms = in_order(by_arm, ARM_ORDER)
        names = _names(list(by_arm.values()), metrics)
        rows = [[metrics.label(name), *(estimate(by_arm[arm].get(name)) for arm in arms)] for name in names]
        found.append(Table(["", *arms], rows, f"Effects as shares of that of {oracle}"))
    if found:
        words = (
            "Effects are differences from the plain arm on the seeds that the arms share, of what grows by factors "
            "differences of logarithms; the intervals, by Fieller’s theorem, cover seeds. “–” means that the oracle "
            "itself has no clear effect there."
        )
        found.append(Note(words, "small"))
    return found


def _pairs(contrasts: Contrasts) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(arm, other, differences), arms in their order."""
    for arm in in_order(contrasts, ARM_ORDER):
        for other, values in contrasts[arm].items():
            yield arm, other, values


def _names(of: list[Mapping[str, Any]], metrics: Metrics) -> list[str]:
    """Metrics and observables in the order of their descriptions, then the others."""
    there = dict.fromkeys(name for values in of for name in values)
    return sorted(there, key=lambda name: list(metrics.described).index(name) if name in metrics.described else 999)


def _forest_title(metric: str, contrasts: Contrasts, metrics: Metrics) -> str:
    found = []
    for arm, other, values in _pairs(contrasts):
        if metric in values:
            side = clear(values[metric])
            found.append(f"{arm} {'above' if side > 0 else 'below'} {other}" if side else f"{arm} ≈ {other}")
    return f"{metrics.label(metric)}: {', '.join(found)}"


def _cell(value: dict[str, Any] | None) -> str:
    if not value:
        return "–"
    ratio = value.get("ratio")
    words = f"{change(value)}; {in_words(value)}" if ratio else in_words(value)
    return f"{'≈ ' if interval_of(ratio or value) and not clear(value) else ''}{words}"
