"""What a stage shows while it runs: one bar for all of it, and a line for every chain or arm."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live as Screen
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from patterning_dist.errors import PatterningError
from patterning_dist.live import NUM_SAID, Line, Live

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_STATES = 2.0


class Progress:
    """A context manager around the stages of a command; where there is no terminal, a plain line every ten seconds.

    Args:
        console: where it is shown.
        keep: takes the state of the run, see ``live.Live.as_json``, every two seconds and at the end.
    """

    def __init__(self, console: Console | None = None, keep: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.console, self._keep = console or Console(), keep
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=self.console, auto_refresh=False,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None)
        self.state = Live()
        self._screen = Screen(console=self.console, get_renderable=self._render, refresh_per_second=4)
        self._last_print = self._last_state = float("-inf")

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._screen.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._screen.stop()
        elif kind is None:
            self._print(at_once=True)
        self.state.ended = "finished" if kind is None else f"{kind.__name__}: {error}" if str(error) else kind.__name__
        self._keep_state(at_once=True)

    def enter(self, stage: str) -> None:
        """A stage begins."""
        self.state.stage = stage

    def start(self, label: str, total: int | None) -> None:
        """A new bar, its lines cleared: what is done, and how many units of it there are."""
        self.state.label, self.state.done, self.state.total = label, 0, total
        self.state.lines.clear()
        self._bar.reset(self._task, description=label, total=total)
        self._last_print = float("-inf")
        self._show()

    def update(self, completed: int) -> None:
        """How many of the bar's units are done."""
        self.state.done = completed
        self._bar.update(self._task, completed=completed)
        self._show()

    def say(self, text: str) -> None:
        """One line that stays."""
        self.state.said = [*self.state.said, text][-NUM_SAID:]
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update_line(self, key: str, *, done: int, total: int, loss: float | None = None, healthy: bool = True) -> None:
        """The state of one chain or arm; loss in nats."""
        self.state.lines[key] = Line(done, total, loss, healthy)
        self._show()

    def measured(self, subject: str, **values: float) -> None:
        """What the chains of a subject say by now, see ``Live``."""
        self.state.measured[subject] = {**self.state.measured.get(subject, {}), **values}

    def _render(self) -> Group:
        height = max(self.console.height - NUM_SAID // 2, 4)
        return Group(self._bar.get_renderable(), *([self.state.table(height)] if self.state.lines else []))

    def _show(self) -> None:
        task = self._bar.tasks[0]
        self.state.seconds_left, self.state.per_second = task.time_remaining, task.speed
        self._print()
        self._keep_state()

    def _keep_state(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._keep is None or not (at_once or now - self._last_state >= SECONDS_BETWEEN_STATES):
            return
        self._last_state = now
        with contextlib.suppress(PatterningError):  # a full disk stops what needs it, and not for the sake of this
            self._keep(self.state.as_json())

    def _print(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if self.console.is_terminal or not (at_once or now - self._last_print >= SECONDS_BETWEEN_LINES):
            return
        self._last_print = now
        if self.state.label:
            self.console.print(self.state.words, markup=False, highlight=False, soft_wrap=True)
