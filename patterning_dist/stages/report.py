"""Stage ``report``: summary.json with every headline number and its interval, and report.html."""

from __future__ import annotations

from pathlib import Path

from patterning_dist.config import Config
from patterning_dist.progress import Progress
from patterning_dist.report import build_report
from patterning_dist.rundir import RunDirectory


def report(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Write summary.json and report.html; returns both."""
    return [build_report(run.path)]
