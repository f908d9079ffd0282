"""Assemble the page: read the run, build its sections, write one file."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from patterning_dist.errors import PatterningError
from patterning_dist.report import arms, chains, headline, record, susceptibilities, validation, weighting
from patterning_dist.report.blocks import Section
from patterning_dist.report.reading import Run
from patterning_dist.report.text import open_text
from patterning_dist.report.words import Metrics
from patterning_dist.report.writing import write_page


def _guarded(run: Run, section: Section, build: Callable[..., None], *arguments: Any) -> Section:
    """A section, filled; a file of an unexpected shape costs that section alone, and is named at the top."""
    try:
        build(section, run, *arguments)
        return section
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        run.problems.append(f"“{section.title}” cannot be drawn: {type(error).__name__}: {error}")
        words = "A file of this section has an unexpected shape; see the warnings at the top."
        return Section(section.name, section.title, missing=words)


def _sections(run: Run, summary: dict[str, Any]) -> list[Section]:
    solution, diagnostics = run.json("weights/solution.json") or {}, run.json("response/diagnostics.json") or {}
    texts, metrics = open_text(run), Metrics(summary.get("metrics") or {})
    builders: list[tuple[str, str, Callable[..., None], tuple[Any, ...]]] = [
        ("headline", "What was asked, what came out", headline.headline, (summary, solution, metrics)),
        ("arms", "The arms, step by step", arms.arms, (summary, metrics)),
        ("response", "Predicted, checked and realised, side by side", arms.response, (summary, solution, metrics)),
        ("weights", "The weights", weighting.weights, (summary, solution, texts)),
        ("susceptibilities", "Susceptibilities", susceptibilities.susceptibilities, (diagnostics, solution, texts)),
        ("chains", "Chains", chains.chains, (summary, diagnostics, metrics)),
        ("baseline", "The baseline checkpoint", record.baseline, (metrics,)),
        ("record", "Cost and record", record.record, (summary,)),
    ]
    if run.config.get("validation"):
        builders.insert(-2, ("validation", "Attribution, measured by retrainings", validation.validation, ()))
    sections = [_guarded(run, Section(name, title), build, *given) for name, title, build, given in builders]
    return sorted(sections, key=lambda section: bool(section.absent))


def when(created: Any) -> str:
    """The time of the summary as a reader writes it; anything else as it stands."""
    try:
        return datetime.fromisoformat(created).strftime("%-d %B %Y, %H:%M %Z").strip()
    except (TypeError, ValueError):
        return str(created or "")


def build_report(run_directory: Path) -> Path:
    """Write `report.html` into a finished or partly finished run directory and return its path.

    The page holds everything it shows: no network, no other file. Stages that have not been run are named.

    Raises PatterningError when the directory does not exist.
    """
    run_directory = Path(run_directory)
    if not run_directory.is_dir():
        raise PatterningError(
            f"{run_directory} is not a run directory; give the folder that holds config.yaml of a run."
        )
    run = Run(run_directory)
    summary = run.json("summary.json") or {}
    sections = _sections(run, summary)
    path = run_directory / "report.html"
    write_page(
        path,
        kind="Patterning report",
        name=summary.get("name") or run_directory.resolve().name,
        created=when(summary.get("created")),
        status="partly finished" if any(section.missing for section in sections) else "all stages run",
        warnings=[str(warning) for warning in summary.get("warnings") or []] + list(dict.fromkeys(run.problems)),
        sections=sections,
    )
    return path
