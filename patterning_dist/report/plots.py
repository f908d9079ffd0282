"""The figures of a run as functions: what the page of the run shows, alone, with the numbers in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from patterning_dist.errors import PatterningError
from patterning_dist.report.coefficients import coefficients
from patterning_dist.report.drawing import Drawing
from patterning_dist.report.heat_map import GROUPS, heat_map
from patterning_dist.report.passages import passages
from patterning_dist.report.probe import Probe
from patterning_dist.report.reading import Run
from patterning_dist.report.text import open_text
from patterning_dist.report.token_map import POINTS, token_map
from patterning_dist.report.traces import Walk, ranks, traces
from patterning_dist.report.words import Metrics

DIAGNOSTICS = "response/diagnostics.json"


class Plots:
    """Figures of a run, each a ``Drawing``: it shows itself in a notebook, and ``save`` writes SVG, HTML or CSV.

    Args:
        run: whose files they are of.
        name: of the run, for messages.
        fetch: (name, suffix of files of a folder): has the files there, and raises where one is damaged.
    """

    def __init__(self, run: Run, name: str, fetch: Callable[[str, str], None]) -> None:
        self._run, self._name, self._fetch = run, name, fetch

    def token_map(self, *, colour: str | None = None, points: int = POINTS) -> Drawing:
        """Losses by their chi over components and observables, on two principal components; a panel a checkpoint.

        Args:
            colour: ``pattern``, ``domain`` or ``label``; default: the first that the run has.
            points: drawn at most, in all panels together.

        Raises:
            PatterningError: nothing is measured, or there is no such column.

        Example:
            >>> open_run("runs/quickstart").plot.token_map(colour="domain").save("map.csv")  # doctest: +SKIP
        """
        return token_map(self._probe(), colour=colour, points=points)

    def heat_map(self, *, observable: str | None = None, kind: str | None = None) -> Drawing:
        """Mean chi of groups of losses in standard errors, component by group; a panel a checkpoint.

        Args:
            observable: whose chi; default: the first.
            kind: ``pattern``, ``domain`` or ``label``; default: the first that the run has.

        Raises:
            PatterningError: the run has no groups, or none of this name.
        """
        self._fetch(GROUPS, "")
        table = self._run.table(GROUPS)
        if table is None:
            why = "the probe has one domain, label and pattern alone, or stage sample is not done"
            raise self._missing(f"{GROUPS} is not there: {why}")
        return heat_map(table, observable=observable, kind=kind)

    def passages(
        self,
        *,
        observable: str | None = None,
        component: str | None = None,
        checkpoint: str | None = None,
        count: int = 2,
    ) -> Drawing:
        """Text whose tokens are coloured by chi, but for those below 2 standard errors.

        Args:
            observable, component, checkpoint: of the row of chi; default: the row that repeats best.
            count: sequences, those with most coloured tokens.

        Raises:
            PatterningError: there is no such row, or the run has no text.
        """
        return passages(self._probe(), observable=observable, component=component, checkpoint=checkpoint, count=count)

    def llc(self) -> Drawing:
        """LLC of every component with its 95 % interval, over the checkpoints where there are several.

        Raises:
            PatterningError: nothing is measured.
        """
        return coefficients(self._diagnostics()["subjects"])

    def traces(self, subject: str) -> Drawing:
        """Loss and observables of every draw of a subject (``everything``, ``step-512/layer.1.head.0``).

        Raises:
            PatterningError: there is no such subject.
        """
        return traces(self._walk(subject), Metrics((self._run.json("summary.json") or {}).get("metrics") or {}))

    def ranks(self, subject: str) -> Drawing:
        """Rank plots of the chains of a subject: even where they agree.

        Raises:
            PatterningError: there is no such subject.
        """
        return ranks(self._walk(subject))

    def _diagnostics(self) -> dict[str, Any]:
        self._fetch(DIAGNOSTICS, "")
        found = self._run.json(DIAGNOSTICS)
        if found is None:
            raise self._missing(f"{DIAGNOSTICS} is not there: stage sample is not done")
        return found

    def _probe(self) -> Probe:
        diagnostics = self._diagnostics()
        for folder in ("response", "data"):
            self._fetch(folder, ".parquet")
        probe = Probe.of(self._run, diagnostics, open_text(self._run))
        if probe is None:
            raise self._missing("there is no response/susceptibility-*.parquet: stage sample is not done")
        return probe

    def _walk(self, subject: str) -> Walk:
        known = list(self._diagnostics()["subjects"])
        if subject not in known:
            raise PatterningError(f"{self._name}: no subject '{subject}'; there are {', '.join(known)}")
        path = f"sampling/{subject}/traces.parquet"
        self._fetch(path, "")
        self._fetch("response", ".parquet")
        table = self._run.table(path)
        if table is None:
            raise self._missing(f"{path} is not there: stage sample is not done")
        return Walk.of(self._run, subject, table)

    def _missing(self, why: str) -> PatterningError:
        """What could not be read, else why it is not there."""
        return PatterningError(f"{self._name}: {next(iter(self._run.problems), why)}")
