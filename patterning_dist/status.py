"""`patterning status` and `watch`: what a run has done, what it is doing, and what its chains say, from its files."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.table import Table
from rich.text import Text

from patterning_dist.errors import PatterningError, first_line
from patterning_dist.live import Live, measured_words
from patterning_dist.storage.run import read_manifest, read_state

SILENCE = 60.0  # seconds without a word after which a driver is thought to be gone
_EVERY = 2.0


@dataclass(frozen=True)
class Status:
    """What the files of a run say.

    Attributes:
        location: of the run.
        stages: name -> entry of the manifest.
        live: what the last driver was doing; None before its first word.
        process: that driver.
        time: of its last word.
    """

    location: str
    stages: Mapping[str, Mapping[str, Any]]
    live: Live | None
    process: str
    time: datetime | None

    @classmethod
    def read(cls, directory: Path | str) -> Status:
        """Raises PatterningError where there is no run."""
        manifest, state = read_manifest(directory), read_state(directory)
        if not manifest:
            raise PatterningError(f"{directory}: no run there, there is no manifest.json; give a run directory")
        if not state:
            return cls(str(directory), manifest.get("stages", {}), None, "", None)
        try:
            time = datetime.fromisoformat(state["time"]).astimezone(UTC)
            found = Live.of_json(state)
        except (KeyError, TypeError, ValueError) as error:
            raise PatterningError(f"{directory}/live.json: cannot be read ({first_line(error)}); delete it") from None
        return cls(str(directory), manifest.get("stages", {}), found, str(state.get("process")), time)

    @property
    def age(self) -> float:
        """Of the driver's last word [s]."""
        return 0.0 if self.time is None else (datetime.now(UTC) - self.time).total_seconds()

    @property
    def at_work(self) -> bool:
        """Whether a driver has said something lately, and nothing of its end."""
        return self.live is not None and self.live.ended is None and self.age < SILENCE

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        live = None if self.live is None else self.live.as_json()
        who = {"process": self.process, "seconds_since": round(self.age, 1), "at_work": self.at_work}
        return {"run": self.location, "stages": self.stages, **who, "live": live}

    def render(self, height: int) -> Group:
        """For a terminal of so many lines."""
        parts: list[RenderableType] = [Text(self.location, style="bold")]
        if self.stages:
            parts.append(self._stages())
        if self.live is None:
            return Group(*parts)
        measured = [f"{name}: {measured_words(values)}" for name, values in self.live.measured.items()]
        parts.append(Text(self._who(), style="" if self.at_work else "yellow"))
        left = height - len(self.stages) - 4
        if self.at_work:
            parts.append(Text(self.live.words))
            room = max(left - min(len(measured), left // 2) - 2, 4)
            parts += [self.live.table(room)] if self.live.lines else []
            left -= min(len(self.live.lines), room) + 2
        shown = measured if len(measured) <= max(left, 3) else measured[: max(left, 3) - 1]
        parts += [Text(line) for line in shown]
        if len(shown) < len(measured):
            parts.append(Text(f"and {len(measured) - len(shown)} more in response/diagnostics.json"))
        parts += [] if self.at_work else [Text(line) for line in self.live.said]
        return Group(*parts)

    def _stages(self) -> Table:
        table = Table("stage", "status", "seconds", box=None, pad_edge=False)
        for name, entry in self.stages.items():
            seconds = entry.get("seconds")
            status = str(entry.get("status"))
            if status == "started" and not self.at_work:
                status = "begun, and nobody at it"
            table.add_row(Text(name), status, "" if seconds is None else f"{seconds:.0f}")
        return table

    def _who(self) -> str:
        assert self.live is not None
        if self.live.ended is not None:
            return f"{self.process} ended {self.age:.0f} s ago: {self.live.ended}"
        if self.at_work:
            return f"{self.process}, stage {self.live.stage}, its last word {self.age:.0f} s ago"
        return (
            f"{self.process} has said nothing for {self.age:.0f} s: it is stopped, or gone; `patterning run "
            f"{self.location}` goes on where it was"
        )


def print_status(directory: Path | str, as_json: bool) -> None:
    """Once."""
    status, console = Status.read(directory), Console()
    if as_json:
        print(json.dumps(status.as_json(), indent=2, ensure_ascii=False))
    else:
        console.print(status.render(console.height))


def watch(directory: Path | str) -> None:
    """Until the driver has ended, or Ctrl-C, which stops the watching alone; what is shown last stays."""
    console, status = Console(), Status.read(directory)
    with contextlib.suppress(KeyboardInterrupt), Screen(console=console, auto_refresh=False) as screen:
        while True:
            screen.update(status.render(console.height), refresh=True)
            if status.live is not None and status.live.ended is not None:
                return
            time.sleep(_EVERY)
            status = Status.read(directory)
