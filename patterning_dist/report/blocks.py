"""What a section of the page is made of; the template turns each kind into HTML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup


@dataclass
class Figure:
    """A drawing with a title that says the finding and an optional line under it."""

    title: str
    svg: Markup
    note: str = ""


@dataclass
class Figures:
    """Drawings side by side."""

    figures: list[Figure]
    legend: list[tuple[str, str]] = field(default_factory=list)  # (style, words)
    folded: str = ""  # words of the fold they lie under; empty: in the open
    kind: Literal["figures"] = "figures"


@dataclass
class Table:
    """A table; numbers are already words. A cell that starts with FLAG is shown as a warning."""

    headers: list[str]
    rows: list[list[str]]
    title: str = ""
    folded: str = ""
    kind: Literal["table"] = "table"


@dataclass
class Note:
    """A sentence or a few; `code` is folded and keeps its lines."""

    text: str
    style: Literal["plain", "lead", "small", "code"] = "plain"
    kind: Literal["note"] = "note"


@dataclass
class Heading:
    """What the blocks below it are of."""

    text: str
    kind: Literal["heading"] = "heading"


@dataclass
class Cards:
    """A few numbers to remember."""

    cards: list[tuple[str, str, str, str]]  # name, value, interval and unit, what it is
    kind: Literal["cards"] = "cards"


Side = Literal["", "up", "down"]


@dataclass
class Piece:
    """One token as shown: `shade` in 0..1, up (above 1) or down (below), and what the pointer tells."""

    text: str
    side: Side = ""
    shade: float = 0.0
    tip: str = ""
    breaks: bool = False


@dataclass
class Line:
    """A token between its neighbours."""

    value: str
    before: str
    token: Piece
    after: str
    domain: str


@dataclass
class Lines:
    """Tokens in context, the token of every line in the same place."""

    title: str
    value_name: str
    lines: list[Line]
    folded: bool = False
    kind: Literal["lines"] = "lines"


@dataclass
class Passage:
    """A whole block of tokens, each shaded."""

    title: str
    pieces: list[Piece]
    scale: tuple[str, str, str]  # words at the lower end, the middle and the upper end of the shading
    value_name: str
    kind: Literal["passage"] = "passage"


Block = Figures | Table | Note | Heading | Cards | Lines | Passage
FLAG = "⚑ "


@dataclass
class Section:
    """One heading of the page."""

    name: str
    title: str
    blocks: list[Block] = field(default_factory=list)
    missing: str = ""  # what has not been run, so that there is nothing to show yet
    absent: str = ""  # why there is nothing to show, and will not be
