"""Heat map of mean chi, component by group of probe entries (domain, label, pattern), in standard errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from patterning_dist.errors import PatterningError
from patterning_dist.report.blocks import Figure, Figures, Note
from patterning_dist.report.drawing import Drawing
from patterning_dist.report.probe import more_than_chance
from patterning_dist.report.reading import COMPONENT_ORDER, in_order
from patterning_dist.report.svg import Plot
from patterning_dist.report.words import number

GROUPS = "response/groups.parquet"
SHOWN_COMPONENTS, PANELS = 24, 6


def heat_map(table: pa.Table, *, observable: str | None = None, kind: str | None = None) -> Drawing:
    """Mean chi of every group over its standard error, a panel a checkpoint; in colour where it is not 0.

    A cell has colour where the 95 % interval of the group's mean chi leaves out 0. Where no more cells have it than
    chance gives, nothing is drawn.

    Args:
        table: of ``response/groups.parquet``.
        observable: whose chi; default: the first.
        kind: of groups: domain, label or pattern; default: the pattern of the token, else what there is.

    Raises:
        PatterningError: there is no such observable or kind.
    """
    rows = table.to_pylist()
    observables, kinds = (list(dict.fromkeys(row[name] for row in rows)) for name in ("observable", "kind"))
    observable = _one_of("observable", observable, observables)
    kind = _one_of("kind", kind, sorted(kinds, key=lambda name: name != "pattern"))
    rows = [row for row in rows if row["observable"] == observable and row["kind"] == kind]
    clear = [row for row in rows if row["low"] > 0 or row["high"] < 0]
    title = f"Mean χ of “{observable}”, component by {kind}"
    if not more_than_chance(len(clear), len(rows)):
        words = (
            f"{title} is noise: {len(clear)} of {len(rows)} means have a 95 % interval without 0, as many as chance "
            "gives, so nothing is drawn of it."
        )
        return Drawing(title, [Note(words)], {})
    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in rows))
    strength = {c: max(abs(_errors(row)) for row in rows if row["component"] == c) for c in _components(rows)}
    kept = sorted(strength, key=lambda name: -strength[name])[:SHOWN_COMPONENTS]
    components = [name for name in strength if name in kept]
    sizes = {row["group"]: row["num_entries"] for row in rows}
    groups = sorted(sizes, key=lambda name: -sizes[name])
    shown = [checkpoints[k] for k in np.unique(np.linspace(0, len(checkpoints) - 1, PANELS).astype(int))]
    drawn = [row for row in rows if row["checkpoint"] in shown and row["component"] in kept]
    largest = max(abs(_errors(row)) for row in drawn)
    panels = []
    for checkpoint in shown:
        here = [row for row in drawn if row["checkpoint"] == checkpoint]
        at = f"{checkpoint}: " if len(shown) > 1 else ""
        panels.append(Figure(at + _finding(here), _panel(here, components, groups, largest, f"{title}, {checkpoint}")))
    words = (
        "Mean χ over the losses of a group, divided by its standard error, which is that of the mean itself. "
        "Blue: more weight on the group raises the observable; orange: it lowers it; grey: the 95 % interval has 0."
    )
    if len(strength) > len(kept):
        words += f" The {len(kept)} components with the largest values of {len(strength)} are shown."
    numbers = {name: [row[name] for row in drawn] for name in table.column_names}
    numbers["standard_errors"] = [_errors(row) for row in drawn]
    return Drawing(title, [Figures(panels), Note(words, "small")], numbers)


def _one_of(what: str, given: str | None, known: list[str]) -> str:
    if given is not None and given not in known:
        raise PatterningError(f"{what}: there is no '{given}' in {GROUPS}; it has {', '.join(known)}")
    return given or known[0]


def _components(rows: list[dict[str, Any]]) -> list[str]:
    return in_order({row["component"] for row in rows}, COMPONENT_ORDER)


def _errors(row: dict[str, Any]) -> float:
    return row["chi"] / row["standard_error"] if row["standard_error"] else 0.0


def _finding(rows: list[dict[str, Any]]) -> str:
    clear = [row for row in rows if row["low"] > 0 or row["high"] < 0]
    if not clear:
        return "no mean is clear of 0"
    row = max(clear, key=lambda row: abs(_errors(row)))
    verb = "raises" if row["chi"] > 0 else "lowers"
    return f"{row['group']} {verb} it most clearly, at {row['component']} ({number(abs(_errors(row)))} standard errors)"


def _panel(
    rows: list[dict[str, Any]], components: list[str], groups: list[str], largest: float, description: str
) -> Markup:
    height = min(40, max(20, 220 // len(components)))
    plot = Plot.of_rows(components, (0, len(groups)), height, columns=groups)
    for row in rows:
        i, j = components.index(row["component"]), groups.index(row["group"])
        value, is_clear = _errors(row), row["low"] > 0 or row["high"] < 0
        shade = 0.12 + 0.78 * abs(value) / largest if is_clear else 0.04
        style = "neutral" if not is_clear else "positive" if value > 0 else "negative"
        tip = (
            f"{row['component']}, {row['group']} ({row['num_entries']:,} losses): χ {number(row['chi'], sign=True)} ± "
            f"{number(row['standard_error'], 2)}, {number(value, 2, sign=True)} standard errors"
        )
        plot.box((j + 0.02, j + 0.98), (i + 0.04, i + 0.96), style, shade, tip)
        if len(groups) <= 10:
            words = number(round(value, 1) + 0.0, decimals=1 if abs(value) < 9.95 else 0)  # no minus before a zero
            strong = is_clear and shade > 0.62
            plot.words(j + 0.5, i + 0.5, words, "cell strong" if strong else "cell", "middle")
    return plot.svg(description)
