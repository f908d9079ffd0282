"""Numbers and names as a reader wants to see them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from patterning_dist.report.reading import interval_of


class Metrics:
    """What metrics and observables are called, as summary.json describes them; others bear their own names.

    Args:
        described: name -> label, unit and meaning.
    """

    def __init__(self, described: Mapping[str, Mapping[str, str]]) -> None:
        self.described = described

    def label(self, name: str) -> str:
        """What it is called on the page."""
        words = self._in_words(name)
        return words[:1].upper() + words[1:]

    def unit(self, name: str) -> str:
        """What it is measured in; empty for one that is not described."""
        return self.described.get(name, {}).get("unit", "")

    def meaning(self, name: str) -> str:
        """A sentence, or nothing."""
        words = self.described.get(name, {}).get("meaning", "")
        return f"{words[:1].upper()}{words[1:]}." if words else ""

    def axis(self, name: str) -> str:
        """What stands at its axis."""
        return f"{self._in_words(name)} ({self.unit(name)})" if self.unit(name) else self._in_words(name)

    def in_sentence(self, name: str) -> str:
        """Its name in the middle of a sentence."""
        return f"the {self._in_words(name)}"

    def term(self, name: str) -> str:
        """What a term of an observable is called beside it; see ``response.contrast.part_names``."""
        return name.rpartition(":")[2].replace("_", " ")

    def effect(self, name: str, value: dict[str, Any]) -> str:
        """What happened to it, claimed no further than its interval goes."""
        ratio = value.get("ratio")
        amount = change(value) if ratio else f"{change(value)} {self.unit(name)}".strip()
        if interval_of(ratio or value) is None:
            moved = f"moved{',' if ratio else ' by'} {amount}"
            return f"{self.in_sentence(name)} {moved} (no interval, so it is not distinguishable from chance)"
        if not clear(value):
            return f"no clear effect on {self.in_sentence(name)} ({amount})"
        return f"{'raised' if clear(value) > 0 else 'lowered'} {self.in_sentence(name)} ({amount})"

    def _in_words(self, name: str) -> str:
        return self.described.get(name, {}).get("label") or name.replace("_", " ")


def number(value: Any, digits: int = 3, decimals: int | None = None, sign: bool = False) -> str:
    """A number in words: a true minus, thousands separated, no false precision; a dash for none."""
    if value is None or isinstance(value, str) or not math.isfinite(value):
        return "–" if value is None or value != value else str(value)
    if decimals is not None:
        text = f"{value:,.{decimals}f}"
    elif value == 0:
        text = "0"
    elif abs(value) >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    elif abs(value) < 1e-4:
        text = f"{value:.{digits - 1}e}".replace("e-0", "e-")
    else:
        text = f"{value:.{digits}g}"
    if sign and value > 0:
        text = f"+{text}"
    return text.replace("-", "−")


def estimate(value: Mapping[str, Any] | None, sign: bool = False) -> str:
    """Value and interval on one line, with as many decimals as the interval can bear."""
    if not value or value.get("value") is None:
        return "–"
    interval = interval_of(value)
    if interval is None or not math.isfinite(value["value"]):
        return number(value["value"], sign=sign)
    width = interval[1] - interval[0]
    decimals = min(7, max(0, math.ceil(-math.log10(width)) + 1)) if width > 0 else 3
    ends = ",\u00a0".join(number(end, decimals=decimals) for end in interval)
    return f"{number(value['value'], decimals=decimals, sign=sign)}\u00a0[{ends}]"


def times(ratio: Mapping[str, Any]) -> str:
    """A ratio with its interval, as ``times 5.1 [3.1, 8.4]``."""
    interval = interval_of(ratio)
    if interval and interval[1] < 2 * interval[0]:
        return f"times\u00a0{estimate(ratio)}"
    ends = f"\u00a0[{number(interval[0], 2)},\u00a0{number(interval[1], 2)}]" if interval else ""
    return f"times\u00a0{number(ratio['value'], 2)}{ends}"


def change(value: Mapping[str, Any]) -> str:
    """A ratio where there is one, else a difference with its sign."""
    return times(value["ratio"]) if value.get("ratio") else estimate(value, sign=True)


def clear(value: Mapping[str, Any] | None) -> int:
    """+1 or -1 when the interval lies on one side of zero, that of a ratio of one; else 0, also without an interval."""
    ratio = (value or {}).get("ratio")
    interval, nothing = interval_of(ratio or value), 1 if ratio else 0
    if interval is None:
        return 0
    return 1 if interval[0] > nothing else -1 if interval[1] < nothing else 0


def listed(parts: list[str]) -> str:
    """a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def duration(seconds: float) -> str:
    """Seconds as s, min or h."""
    if seconds < 120:
        return f"{number(seconds)} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
