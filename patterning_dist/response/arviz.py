"""ArviZ's statistics of traces, imported when one is first asked for: it takes seconds, and few processes need any."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def array_stats() -> Any:
    """R-hat, effective draws and Monte-Carlo errors of arrays [chain, draw]."""
    from arviz_stats.base import array_stats as imported

    return imported
