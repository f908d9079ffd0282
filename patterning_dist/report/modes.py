"""Singular modes of the susceptibilities over the heads of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.report.blocks import Figures, Note
from patterning_dist.report.figures import figure, grid
from patterning_dist.report.reading import COMPONENT_ORDER, Run, column, in_order
from patterning_dist.report.svg import Plot
from patterning_dist.report.text import INDEX, TokenText, entries, shades
from patterning_dist.report.words import number
from patterning_dist.response.reliability import MOSTLY_SIGNAL

SHOWN_MODES, SHOWN_COLUMNS, ENTRIES_A_SIDE = 3, 8, 6


def modes(run: Run, diagnostics: Mapping[str, Any], text: TokenText | None) -> list[Any]:
    """Modes of every checkpoint, with the entries at both ends of the first ones."""
    root, blocks = run.directory / "response", list[Any]()
    for path in sorted(root.rglob("modes.parquet")):
        folder = path.parent.relative_to(root).as_posix().strip(".")
        table = run.table(path.relative_to(run.directory).as_posix())
        if table is None:
            continue
        found = (diagnostics.get("modes") or {}).get(folder or "baseline") or {}
        at = f" at {folder}" if folder else ""
        if (best := _reliability(diagnostics, found)) is not None and best < MOSTLY_SIGNAL:
            words = f"The modes over heads{at} are mostly noise and not drawn: χ of the heads has a split-half "
            words += f"reliability of {number(best, decimals=2)} at best, below {number(MOSTLY_SIGNAL, 2)}."
            blocks.append(Note(words, "small"))
            continue
        blocks += [Figures(_drawn(table, found.get("explained_variance"), at))]
        ends = run.table((path.parent / "mode-tokens.parquet").relative_to(run.directory).as_posix())
        blocks += [] if ends is None else _ends(ends, text, at)
    words = "There are no modes over heads: they take two attention heads or more that are sampled one by one."
    return blocks or [Note(words, "small")]


def _reliability(diagnostics: Mapping[str, Any], found: Mapping[str, Any]) -> float | None:
    """The best of the rows that the modes are of; None where none is known."""
    subjects = diagnostics.get("subjects") or {}
    rows = (subjects[name]["observables"].get(found.get("observable")) for name in found.get("components") or ())
    known = [row["reliability"] for row in rows if row and row.get("reliability") is not None]
    return max(known, default=None)


def _drawn(table: pa.Table, explained: list[float] | None, at: str) -> list[Any]:
    values = column(table, "singular_value").astype(float)
    shares = np.array(explained, dtype=float) if explained else values**2 / max(float((values**2).sum()), 1e-300)
    heads = in_order([c for c in table.column_names if c not in ("mode", "singular_value")], COMPONENT_ORDER)
    names = [str(m) for m in column(table, "mode").tolist()]
    plot = Plot(
        (0, values.size),
        (0, float(values.max()) * 1.1 or 1.0),
        x_label="mode",
        y_label="singular value",
        columns=names,
    )
    for index, value in enumerate(values):
        tip = f"singular value {number(value)}, {100 * shares[index]:.0f} % of the variance"
        plot.box((index + 0.15, index + 0.85), (0, value), "neutral", 1.0, tip)
    loadings = np.stack([column(table, head)[:SHOWN_COLUMNS] for head in heads])
    largest = heads[int(np.argmax(np.abs(loadings[:, 0])))]
    title = f"The first mode over heads{at} carries {100 * shares[0]:.0f} % of the variance"
    svg = grid(loadings, heads, names[:SHOWN_COLUMNS], "Loadings of heads on modes", tip=" (mode)", x_label="mode")
    return [
        *figure(title, plot.svg("Singular values of the modes")),
        *figure(f"The first mode{at} loads most on {largest}", svg),
    ]


def _ends(table: pa.Table, text: TokenText | None, at: str) -> list[Any]:
    order = np.lexsort((column(table, "rank"), -column(table, "sign"), column(table, "mode")))
    table = table.take(pa.array(order))
    index = {name: column(table, name) for name in INDEX if name in table.column_names}
    mode, score = column(table, "mode"), column(table, "score").astype(float)
    blocks = []
    for shown in np.unique(mode)[:SHOWN_MODES]:
        up, down = (np.flatnonzero((mode == shown) & side)[:ENTRIES_A_SIDE] for side in (score > 0, score <= 0))
        blocks.append(
            entries(
                f"Mode {shown}{at}: highest and lowest scores",
                "score",
                index,
                score,
                [*up, *reversed(down)],
                lambda row: number(score[row], sign=True),
                shades(score),
                text,
            )
        )
    return blocks
