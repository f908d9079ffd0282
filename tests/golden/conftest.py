"""The option that writes the golden numbers anew, and a line at the end that says how many are equal bit for bit."""

from __future__ import annotations

import pytest

SAME_BITS = pytest.StashKey[dict[str, tuple[int, int]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-update", action="store_true", help="write tests/golden/*.json; say why in the changelog")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SAME_BITS] = {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for kind, (same, number) in config.stash[SAME_BITS].items():
        terminalreporter.write_line(f"golden {kind}: {same} of {number} arrays are equal bit for bit")
