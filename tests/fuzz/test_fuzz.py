"""A few broken inputs of every kind, on every change; thousands by ``python tests/fuzz/fuzz.py``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # whatever the import mode of the tests
fuzz = importlib.import_module("fuzz")

NUMBER = {"config": 50, "data": 40, "corpus": 15, "model": 25, "page": 15, "state": 60}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", sorted(NUMBER))
def test_what_is_broken_is_refused_in_a_line(kind: str) -> None:
    found, bad = fuzz.fuzz(kind, range(NUMBER[kind]))
    assert not bad
    # Not every fault is one, and not all mutants are refused for one reason that has nothing to do with the fault.
    assert found["done"] and sum(found.values()) == NUMBER[kind]
    assert kind == "page" or found["refused"] >= 2  # a page says in its place what it cannot show


def test_a_command_that_falls_over_or_hangs_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The judge itself: what it takes for bad is bad."""
    command = fuzz.COMMANDS.registered_commands[-1]
    for body, what in (
        ("raise ValueError('x')", "an exception comes through"),
        ("while True: pass", "takes too long"),
        ("import typer; raise typer.Exit(1)", "exit code 1"),
    ):
        scope: dict = {}
        exec(f"from pathlib import Path\ndef broken(run: Path) -> None:\n    {body}", scope)
        monkeypatch.setattr(command, "callback", scope["broken"])
        monkeypatch.setattr(fuzz, "SECONDS", 1)
        assert fuzz.answer(["page", str(tmp_path)])[0] == what
