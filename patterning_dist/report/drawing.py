"""A figure by itself: shown in a notebook, saved as a file, and its numbers as a table."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from patterning_dist.errors import PatterningError
from patterning_dist.report.blocks import Block, Figure, Figures
from patterning_dist.report.rules import SCOPE, plain_rules, scoped_rules
from patterning_dist.report.svg import WIDTH
from patterning_dist.report.writing import environment
from patterning_dist.storage.files import write_text

if TYPE_CHECKING:
    import pandas as pd

_FRAME = "background: var(--paper); color: var(--ink); padding: 14px; font: 15px/1.5 var(--sans);"
_GAP, _LINE, _LETTERS = 36, 17, 62  # of a saved drawing: between panels, a line of text, letters of a title's line


@dataclass(frozen=True)
class Drawing:
    """A figure as the page of a run shows it, and the numbers that are drawn in it.

    Attributes:
        title: what it is of.
        blocks: of the page.
        numbers: columns of a table, a row a mark; empty where nothing is drawn since it would be noise.
    """

    title: str
    blocks: Sequence[Block]
    numbers: Mapping[str, Sequence[Any] | np.ndarray]

    @property
    def table(self) -> pd.DataFrame:
        """The numbers that are drawn."""
        import pandas as pd

        return pd.DataFrame({name: list(values) for name, values in self.numbers.items()})

    def save(self, path: Path | str) -> Path:
        """Write the drawing, or its numbers; returns the path.

        Args:
            path: ends in ``.svg`` (one drawing, light, that any program reads), ``.html`` (a page that needs no other
                file) or ``.csv`` (the numbers).

        Raises:
            PatterningError: another ending, or nothing that an SVG can show: text, or rows that are noise.

        Example:
            >>> open_run("runs/quickstart").plot.token_map().save("map.svg")  # doctest: +SKIP
        """
        path = Path(path)
        if path.suffix == ".csv":
            content = self.table.to_csv(index=False)
        elif path.suffix == ".html":
            title = Markup("<title>{}</title>").format(self.title)
            content = f'<!doctype html>\n<html lang="en"><meta charset="utf-8">{title}\n{self._repr_html_()}\n</html>\n'
        elif path.suffix == ".svg":
            content = self._svg()
        else:
            raise PatterningError(f"{path}: a figure is saved as .svg, .html or .csv")
        write_text(path, content)
        return path

    def _repr_html_(self) -> str:
        module: Any = environment().get_template("blocks.html").module
        style = "\n".join(f"{rule} {{{body}}}" for rule, body in scoped_rules())
        body = _with_titles(module.blocks(self.blocks))
        return f'<div class="{SCOPE[1:]}"><style>\n{style}\n{SCOPE} {{ {_FRAME} }}\n</style>\n{body}</div>'

    def _svg(self) -> str:
        shown = [block for block in self.blocks if isinstance(block, Figures)]
        panels = [figure for block in shown for figure in block.figures]
        if not panels:
            raise PatterningError(f"{self.title}: there is no drawing to save as .svg; .html has the words")
        across = 1 if len(panels) == 1 else 2
        legend = [entry for block in shown[:1] for entry in block.legend]
        parts, top = _legend(legend, across), _LINE * -(-len(legend) // (3 * across)) + (10 if legend else 0)
        for start in range(0, len(panels), across):
            row = [_panel(panel) for panel in panels[start : start + across]]
            below = top + _LINE * max(text.count("<tspan") for text, _, _ in row)
            for column, (text, drawing, height) in enumerate(row):
                left = column * (WIDTH + _GAP)
                parts.append(Markup('<g transform="translate({} {})">{}</g>').format(left, top, text))
                frame = f'<svg x="{left}" y="{below}" width="{WIDTH}" height="{height}" '
                parts.append(drawing.replace("<svg ", frame, 1))
            top = below + max(height for *_, height in row) + _GAP
        drawn = "\n".join(parts)
        width, height = across * (WIDTH + _GAP) - _GAP + 24, top - _GAP + 24
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-12 -12 {width} {height}" width="{width}" '
            f'height="{height}" class="{SCOPE[1:]}">\n<style>{plain_rules(drawn)}</style>\n'
            f'<rect x="-12" y="-12" width="100%" height="100%" fill="#ffffff"/>\n{drawn}\n</svg>\n'
        )


def _panel(figure: Figure) -> tuple[str, str, int]:
    """Title as text, drawing, and its height."""
    lines = textwrap.wrap(figure.title, _LETTERS)
    spans = Markup("").join(
        Markup('<tspan x="0" y="{}">{}</tspan>').format(12 + _LINE * k, line) for k, line in enumerate(lines)
    )
    found = re.search(r'viewBox="0 0 \d+ (\d+)"', figure.svg)
    assert found is not None
    return Markup('<text class="title">{}</text>').format(spans), _with_titles(figure.svg), int(found[1])


def _legend(entries: Sequence[tuple[str, str]], across: int) -> list[str]:
    """Keys in rows of three a panel."""
    parts, step = list[str](), WIDTH // 3
    for number, (style, words) in enumerate(entries):
        row, column = divmod(number, 3 * across)
        key = '<circle class="dot {}" cx="{}" cy="{}" r="5"/><text x="{}" y="{}">{}</text>'
        y = 6 + row * _LINE
        parts.append(Markup(key).format(style, 6 + column * step, y, 18 + column * step, y + 4, words))
    return parts


def _with_titles(markup: str) -> str:
    """What the pointer tells by ``title``: there is no script beside a single figure."""
    marks = re.compile(r'<(circle|rect|path)([^>]*?) data-tip="([^"]*)"([^>]*)></')
    return marks.sub(r"<\1\2\4><title>\3</title></", str(markup)).replace(' data-tip="', ' title="')
