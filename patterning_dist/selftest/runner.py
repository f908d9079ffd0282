"""All checks, a line each as soon as it is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from rich.console import Console
from rich.text import Text

from patterning_dist.errors import PatterningError
from patterning_dist.selftest import chi, llc, window
from patterning_dist.selftest.check import SIGMAS, Check

Group = Callable[[], Iterator[Check]]
GROUPS: tuple[Group, ...] = (
    llc.stretched_gaussian,
    llc.powers,
    llc.reduced_rank,
    llc.diabetes,
    chi.gaussian,
    chi.four_gon,
    window.windows,
)


def print_checks(groups: Sequence[Group] = GROUPS) -> int:
    """The checks as lines on the terminal; the exit code of the command, 1 if anything is off."""
    console, threads, begin = Console(), torch.get_num_threads(), time.monotonic()
    head = f"{'':62}{'expected':>12}{'found':>12}  {SIGMAS:g} errors + allowance"
    console.print(head, soft_wrap=True, highlight=False)
    lines: list[bool] = []

    def show(ok: bool, text: str) -> None:
        lines.append(ok)
        verdict = Text(f"{'ok' if ok else 'FAILED':8}", "green" if ok else "bold red")
        console.print(verdict + Text(text), soft_wrap=True, highlight=False)

    torch.set_num_threads(1)  # the tensors are small
    try:
        for group in groups:
            _show_group(group, show)
    finally:
        torch.set_num_threads(threads)
    failed = lines.count(False)
    end = f"{failed} of {len(lines)} FAILED: do not believe the numbers of this installation" if failed else "all ok"
    console.print(f"{end}, {time.monotonic() - begin:.0f} s", highlight=False)
    return int(failed > 0)


def _show_group(group: Group, show: Callable[[bool, str], None]) -> None:
    begin = time.monotonic()
    try:
        for check in group():
            now = time.monotonic()
            errors = f"{SIGMAS:g} x {check.standard_error:.2g} + {check.allowance:.2g}"
            text = f"{check.name:54}{check.expected:12.6g}{check.found:12.6g}  {errors:24}{now - begin:5.1f} s"
            show(check.ok, text)
            begin = now
    except PatterningError as error:
        show(False, f"{group.__name__}: {error}")
