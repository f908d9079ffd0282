"""What a stage shows while it runs: one bar for all of it, and a line for every chain or arm."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A context manager around a stage; where there is no terminal, a plain line every ten seconds."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=self.console, auto_refresh=False,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None)
        self._lines: dict[str, dict[str, object]] = {}
        self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4)
        self._last_print = float("-inf")

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()
        elif kind is None:
            self._print(at_once=True)

    def start(self, label: str, total: int | None) -> None:
        """A new bar, its lines cleared: what is done, and how many units of it there are."""
        self._lines.clear()
        self._bar.reset(self._task, description=label, total=total)
        self._last_print = float("-inf")
        self._print()

    def update(self, completed: int) -> None:
        """How many of the bar's units are done."""
        self._bar.update(self._task, completed=completed)
        self._print()

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update_line(self, key: str, *, done: int, total: int, loss: float | None = None, healthy: bool = True) -> None:
        """The state of one chain or arm; loss in nats."""
        self._lines[key] = {"done": done, "total": total, "loss": loss, "healthy": healthy}
        self._print()

    def _render(self) -> Group:
        table = Table("name", "done", "loss [nats]", "state", box=None, pad_edge=False)
        # More lines than the screen has are cut off at the bottom: finished ones go there.
        for key, line in sorted(self._lines.items(), key=lambda item: item[1]["done"] == item[1]["total"]):
            loss = "" if line["loss"] is None else f"{line['loss']:.4f}"
            state = Text("healthy") if line["healthy"] else Text("failed", style="red")
            table.add_row(Text(key), f"{line['done']}/{line['total']}", loss, state)
        return Group(self._bar.get_renderable(), table) if self._lines else Group(self._bar.get_renderable())

    def _print(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if self.console.is_terminal or not (at_once or now - self._last_print >= SECONDS_BETWEEN_LINES):
            return
        self._last_print = now
        task = self._bar.tasks[0]
        if not task.description:
            return
        text = f"{task.description}: {task.completed:.0f}"
        if task.total is not None:
            text += f" of {task.total:.0f}"
        if task.time_remaining is not None:
            text += f", {task.time_remaining:.0f} s left"
        if failed := [key for key, line in self._lines.items() if not line["healthy"]]:
            text += f"; failed: {', '.join(failed)}"
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
