"""A small plot in SVG, coloured by the page's style sheet (so it follows light and dark)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from patterning_dist.report.words import number

_LETTER = 6.6  # width of a letter
_SLANT = 38  # degrees, of names of columns that are wider than these
_SLANT_SINE = math.sin(math.radians(_SLANT))
WIDTH = 440  # user units: near one CSS pixel in a column of the page, and still legible on a narrow screen


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values inside [low, high], about `count` of them."""
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [0.0 if k == 0 else k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_words(ticks: Sequence[float]) -> list[str]:
    """Labels with the decimals that the spacing needs."""
    step = min(np.diff(ticks)) if len(ticks) > 1 else abs(ticks[0]) if len(ticks) else 1.0
    if step and step < 1e-4:
        return [number(tick, 2) for tick in ticks]
    decimals = next((d for d in range(7) if abs(round(step, d) - step) < 1e-9 * max(1, step)), 6)
    return [number(tick, decimals=decimals) for tick in ticks]


def factor_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round factors with their words, at their logarithms inside [low, high]; natural logarithms."""
    first, last = math.exp(low), math.exp(high)
    factors = nice_ticks(first, last)
    if last > 4 * first:
        powers = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
        digits = (1, 2, 5) if last < 200 * first else (1,)
        factors = [factor for k in powers for digit in digits if first <= (factor := digit * 10.0**k) <= last]
    return [(math.log(factor), number(factor)) for factor in factors if factor > 0]


def padded(values: Sequence[float] | np.ndarray, include: Sequence[float] = ()) -> tuple[float, float]:
    """A range that holds the finite values and `include`, with air on both sides."""
    array = np.concatenate([np.asarray(values, dtype=np.float64).ravel(), np.asarray(include, dtype=np.float64)])
    array = array[np.isfinite(array)]
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 1.0)
    air = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - air, high + air


class Plot:
    """Axes of `x_range` by `y_range` data units; each method draws one more thing on them."""

    def __init__(
        self,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        *,
        height: int = 232,
        x_label: str = "",
        y_label: str = "",
        left: int = 48,
        right: int = 18,
        rows: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
        x_ticks: Sequence[tuple[float, str]] | None = None,
        y_ticks: Sequence[tuple[float, str]] | None = None,
    ) -> None:
        self.x_range, self.y_range = x_range, y_range
        self.left, self.right, self.top, self.bottom = left, WIDTH - right, 26 if y_label else 10, height - 38
        longest = max(map(len, columns or [""])) * _LETTER
        is_slanted = columns is not None and longest > (self.right - left) / len(columns)
        self.height = height = height + (int(longest * _SLANT_SINE) if is_slanted else 0)
        self.parts: list[Markup] = []
        if columns is None:
            ticks = nice_ticks(*x_range, count=5)
            for value, words in x_ticks or zip(ticks, tick_words(ticks), strict=True):
                self._line(self.x(value), self.top, self.x(value), self.bottom, "grid" if rows else "tick")
                self._text(self.x(value), self.bottom + 15, words, "tick-label", "middle")
        else:
            for index, words in enumerate(columns):
                x, y = self.x(index + 0.5), self.bottom + 15
                if is_slanted:
                    turn = f"rotate({-_SLANT} {x:.1f} {y:.1f})"
                    self._add("text", "tick-label", words, x=x, y=y, text_anchor="end", transform=turn)
                else:
                    self._text(x, y, words, "tick-label", "middle")
        if rows is None:
            ticks = nice_ticks(*y_range, count=4)
            for value, words in y_ticks or zip(ticks, tick_words(ticks), strict=True):
                self._line(self.left, self.y(value), self.right, self.y(value), "grid")
                self._text(self.left - 7, self.y(value) + 4, words, "tick-label", "end")
        else:
            for index, words in enumerate(rows):
                self._text(self.left - 10, self.y(index + 0.5) + 4, words, "row-label", "end")
        if x_label:
            self._text((self.left + self.right) / 2, height - 5, x_label, "axis-label", "middle")
        if y_label:
            self._text(2, 13, y_label, "axis-label", "start")

    @classmethod
    def of_rows(cls, names: Sequence[str], x_range: tuple[float, float], row_height: int, **labels: Any) -> Plot:
        """A row for every name; names have the room on the left that they need."""
        left = min(230, 14 + max(40, int(7.1 * max(map(len, names)))))
        return cls(x_range, (len(names), 0), rows=names, left=left, height=48 + row_height * len(names), **labels)

    def x(self, value: float) -> float:
        """Horizontal place of a data value."""
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Vertical place of a data value."""
        low, high = self.y_range
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def _add(self, tag: str, style: str, content: str = "", **attributes: float | str) -> None:
        """One more element; numbers in tenths of a unit."""
        given = [(k.replace("_", "-"), f"{v:.1f}" if isinstance(v, float) else v) for k, v in attributes.items()]
        text = Markup("").join(Markup(' {}="{}"').format(*pair) for pair in [("class", style), *given])
        self.parts.append(Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), text, content))

    def _line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        self._add("line", style, x1=x1, y1=y1, x2=x2, y2=y2)

    def _text(self, x: float, y: float, words: str, style: str, anchor: str) -> None:
        self._add("text", style, words, x=x, y=y, text_anchor=anchor)

    def curve(self, xs: np.ndarray, ys: np.ndarray, style: str) -> None:
        """A line through the points; where a value is not finite it is broken."""
        path, pen = [], "M"
        for x, y in zip(xs, ys, strict=True):
            if math.isfinite(y):
                path.append(f"{pen}{self.x(x):.1f} {self.y(y):.1f}")
                pen = "L"
            else:
                pen = "M"
        self._add("path", f"curve {style}", d="".join(path))

    def band(self, xs: np.ndarray, low: np.ndarray, high: np.ndarray, style: str) -> None:
        """What lies between two lines; where either is not finite there is nothing."""
        there = np.flatnonzero(np.isfinite(low) & np.isfinite(high))
        for run in np.split(there, np.flatnonzero(np.diff(there) > 1) + 1) if there.size else ():
            ends = [*((xs[k], high[k]) for k in run), *((xs[k], low[k]) for k in run[::-1])]
            path = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in ends)
            self._add("path", f"band {style}", d=f"M{path}z")

    def dot(self, x: float, y: float, style: str, radius: float = 4, tip: str = "") -> None:
        """A filled point; `tip` is shown by the pointer."""
        if math.isfinite(x) and math.isfinite(y):
            described = {"data_tip": tip} if tip else {}
            self._add("circle", f"dot {style}", cx=self.x(x), cy=self.y(y), r=f"{radius}", **described)

    def diamond(self, x: float, y: float, style: str, tip: str = "") -> None:
        """A diamond, for what was predicted."""
        path = f"M{self.x(x):.1f} {self.y(y) - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"
        self._add("path", f"dot {style}", d=path, data_tip=tip)

    def span(self, x1: float, x2: float, y: float, style: str) -> None:
        """A horizontal interval with small ends."""
        self._line(self.x(x1), self.y(y), self.x(x2), self.y(y), f"span {style}")
        for x in (x1, x2):
            self._line(self.x(x), self.y(y) - 4, self.x(x), self.y(y) + 4, f"span {style}")

    def span_up(self, y1: float, y2: float, x: float, style: str) -> None:
        """A vertical interval with small ends."""
        self._line(self.x(x), self.y(y1), self.x(x), self.y(y2), f"span {style}")
        for y in (y1, y2):
            self._line(self.x(x) - 4, self.y(y), self.x(x) + 4, self.y(y), f"span {style}")

    def box(
        self, x: tuple[float, float], y: tuple[float, float], style: str, shade: float = 1.0, tip: str = ""
    ) -> None:
        """A filled rectangle in data units, `shade` of its colour in 0..1."""
        left, right = sorted((self.x(x[0]), self.x(x[1])))
        top, bottom = sorted((self.y(y[0]), self.y(y[1])))
        width, height = max(right - left, 0.0), max(bottom - top, 0.0)
        fill = {"fill_opacity": f"{shade:.2f}", "data_tip": tip}
        self._add("rect", f"box {style}", x=left, y=top, width=width, height=height, **fill)

    def rule(self, *, x: float | None = None, y: float | None = None, style: str = "rule", words: str = "") -> None:
        """A straight line across the plot at a data value."""
        if x is not None:
            self._line(self.x(x), self.top, self.x(x), self.bottom, style)
        if y is not None:
            self._line(self.left, self.y(y), self.right, self.y(y), style)
            if words:
                self._text(self.left + 4, self.y(y) - 5, words, "rule-label", "start")

    def words(
        self, x: float, y: float, text: str, style: str = "value", anchor: str = "start", shift: float = 0
    ) -> None:
        """Text at a data place."""
        self._text(self.x(x) + shift, self.y(y) + 4, text, style, anchor)

    def svg(self, description: str) -> Markup:
        """The drawing; `description` is read out where it cannot be seen."""
        return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            WIDTH, self.height, escape(description), Markup("").join(self.parts)
        )
