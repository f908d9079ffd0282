"""What a run is doing now: one small value, for the terminal, ``live.json``, ``patterning status`` and ``watch``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter
from rich.table import Table
from rich.text import Text

_UNIT = re.compile(r"(?P<unit>.+?) (?:chain|seed) \d+")  # of the name of a chain, or of a training
NUM_SAID = 8  # last lines that are kept


@dataclass
class Line:
    """The state of one chain, training or task; loss in nats."""

    done: int
    total: int
    loss: float | None = None
    healthy: bool = True


@dataclass
class Live:
    """The state of a run.

    Attributes:
        stage: that is run.
        label: of what is done in it.
        done, total: units of that, None where their number is not known.
        seconds_left, per_second: of these, None as long as nothing can be said.
        lines: name of a chain, training or task -> its state.
        measured: subject -> what its chains say so far: llc, llc_error, rhat, ess, reliability; None, as JSON has it,
            for what is not finite.
        said: the last lines for the user.
        ended: how the driver ended; None while it is at work.
    """

    stage: str = ""
    label: str = ""
    done: float = 0
    total: float | None = None
    seconds_left: float | None = None
    per_second: float | None = None
    lines: dict[str, Line] = field(default_factory=dict)
    measured: dict[str, dict[str, float | None]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    ended: str | None = None

    def as_json(self) -> dict[str, Any]:
        """What ``of_json`` reads."""
        return asdict(self)

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> Live:
        """Raises ValueError for what ``as_json`` has not made."""
        return TypeAdapter(cls).validate_python(content)

    @property
    def words(self) -> str:
        """One line: what is done of what, and how long it will take."""
        text = f"{self.label}: {self.done:.0f}"
        if self.total is not None:
            text += f" of {self.total:.0f}"
        if self.seconds_left is not None:
            text += f", {self.seconds_left:.0f} s left"
        if failed := [key for key, line in self.lines.items() if not line.healthy]:
            text += f"; failed: {', '.join(failed)}"
        return text

    def table(self, height: int) -> Table:
        """A row a chain or training; where they are more than ``height``, a row a unit, and the rest counted.

        What has failed stands first, then what is under way, last what is through.
        """
        rows = [_Row(key, [(key, line)], self.measured.get(key, {})) for key, line in self.lines.items()]
        if len(rows) > height:
            units: dict[str, list[tuple[str, Line]]] = {}
            for key, line in self.lines.items():
                found = _UNIT.match(key)
                units.setdefault(found["unit"] if found else key, []).append((key, line))
            rows = [_Row(unit, members, self.measured.get(unit, {})) for unit, members in units.items()]
        rows.sort(key=lambda row: row.order)
        table = Table("name", "done", "loss [nats]", "state", box=None, pad_edge=False)
        shown = rows if len(rows) <= height else rows[: max(height - 1, 1)]
        for row in shown:
            table.add_row(Text(row.name), row.done, row.loss, row.state)
        if len(shown) < len(rows):
            table.add_row(f"and {len(rows) - len(shown)} more", "", "", "")
        return table


@dataclass
class _Row:
    """Some chains or trainings of one unit."""

    name: str
    members: list[tuple[str, Line]]
    measured: Mapping[str, float | None]

    @property
    def failed(self) -> list[str]:
        return [key for key, line in self.members if not line.healthy]

    @property
    def order(self) -> int:
        """0: something failed, 1: under way, 2: through."""
        return 0 if self.failed else 2 if all(line.done == line.total for _, line in self.members) else 1

    @property
    def done(self) -> str:
        return f"{sum(line.done for _, line in self.members)}/{sum(line.total for _, line in self.members)}"

    @property
    def loss(self) -> str:
        losses = [line.loss for _, line in self.members if line.loss is not None]
        return f"{sum(losses) / len(losses):.4f}" if losses else ""

    @property
    def state(self) -> Text:
        if len(self.members) == 1:
            return Text("failed", style="red") if self.failed else Text("healthy")
        parts = [f"{sum(line.done == line.total for _, line in self.members)} of {len(self.members)} through"]
        if self.failed:
            parts.append(f"failed: {', '.join(_numbers(self.failed))}")
        elif self.order == 1:
            key, slowest = min(self.members, key=lambda member: member[1].done / max(member[1].total, 1))
            parts.append(f"last: {_numbers([key])[0]} at {slowest.done}")
        if "rhat" in self.measured:
            parts.append(f"R-hat {_known(self.measured['rhat'], '.2f')}")
        return Text("; ".join(parts), style="red" if self.failed else "")


def _numbers(keys: list[str]) -> list[str]:
    """Names without their unit, which stands beside: ``chain 3``, ``seed 1``."""
    found = [_UNIT.match(key) for key in keys]
    return [key[len(unit["unit"]) + 1 :] if unit else key for key, unit in zip(keys, found, strict=True)]


def measured_words(measured: Mapping[str, float | None]) -> str:
    """What the chains of a subject say, in one line.

    Examples:
        >>> measured_words({"llc": 3.0, "llc_error": 0.1, "rhat": 1.01})
        'LLC 3 ± 0.1, R-hat 1.01'
    """
    parts = []
    if "llc" in measured:
        parts.append(f"LLC {_known(measured['llc'], '.3g')} ± {_known(measured.get('llc_error'), '.2g')}")
    for name, label, form in (
        ("rhat", "R-hat", ".2f"),
        ("ess", "effective draws", ".0f"),
        ("reliability", "reliability of chi", ".2f"),
    ):
        if name in measured:
            parts.append(f"{label} {_known(measured[name], form)}")
    return ", ".join(parts)


def _known(value: float | None, form: str) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:{form}}"
