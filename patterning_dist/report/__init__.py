"""The self-contained HTML page of a run."""

from __future__ import annotations

from patterning_dist.report.page import build_report

__all__ = ["build_report"]
