"""chi of the probe entries of a run, read row by row, with what says whether a row is more than noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

from patterning_dist.report.reading import Run, column
from patterning_dist.report.text import TokenText, split_of
from patterning_dist.report.words import listed, number
from patterning_dist.response.failure_modes import CHANCE
from patterning_dist.response.reliability import MOSTLY_SIGNAL

_VALUES = ("center_loss", "rhat", "loss")  # columns of a table besides chi_ and se_ that are no index
_CONTEXT = (28, 12)  # characters before and after a token
BASELINE = "baseline"  # what subjects are of that name no checkpoint
_MISSED = 0.05  # how often an interval or two standard errors exclude a true zero


@dataclass(frozen=True, order=True)
class Row:
    """A row of chi: of which observable, of chains on which component at which checkpoint."""

    checkpoint: str
    component: str
    observable: str

    def __str__(self) -> str:
        return f"{self.component} · {self.observable}"


@dataclass(frozen=True)
class Probe:
    """The susceptibility tables of a run.

    Attributes:
        run: whose files they are.
        paths: (checkpoint, component) -> table, in the order of the run.
        observables: of all tables.
        index: what every probe entry is of, name -> [entry].
        reliability: of every row that has one: split-half correlation over the entries.
        text: of the split that the entries are in, where the run keeps it.
    """

    run: Run
    paths: Mapping[tuple[str, str], str]
    observables: Sequence[str]
    index: Mapping[str, np.ndarray]
    reliability: Mapping[Row, float]
    text: TokenText | None

    @classmethod
    def of(cls, run: Run, diagnostics: Mapping[str, Any], texts: Mapping[str, TokenText]) -> Probe | None:
        """What a run has; None where it has measured nothing yet.

        Args:
            run: see above.
            diagnostics: content of response/diagnostics.json.
            texts: splits of the run's text.
        """
        tables, subjects = run.susceptibilities(), diagnostics.get("subjects") or {}
        known = [name for name in subjects if name in tables]
        names = [name for name in [*known, *(n for n in tables if n not in subjects)] if "~" not in name]
        paths = {_parts(name): tables[name] for name in names}
        first = next((t for path in paths.values() if (t := run.table(path)) is not None and t.num_rows), None)
        if first is None:
            return None
        chi = [name.removeprefix("chi_") for name in first.column_names if name.startswith("chi_")]
        index = {
            name: column(first, name)
            for name in first.column_names
            if not name.startswith(("chi_", "se_")) and name not in _VALUES
        }
        rows = {
            Row(*_parts(name), observable): entry["reliability"]
            for name in known
            for kind in ("observables", "controlled")
            for observable, entry in (subjects[name].get(kind) or {}).items()
            if entry.get("reliability") is not None
        }
        judged = {row.observable for row in rows}  # responses of the posterior as a whole have no reliability
        kept = [name for name in chi if name in judged] or chi
        return cls(run, paths, kept, index, rows, texts.get(split_of(first, texts) or ""))

    @property
    def checkpoints(self) -> list[str]:
        """In the order of the run."""
        return list(dict.fromkeys(checkpoint for checkpoint, _ in self.paths))

    @property
    def components(self) -> list[str]:
        """Of all checkpoints."""
        return list(dict.fromkeys(component for _, component in self.paths))

    @property
    def num_entries(self) -> int:
        """Probe entries of every table."""
        return len(next(iter(self.index.values())))

    def rows(self, checkpoint: str) -> list[Row]:
        """All rows at a checkpoint."""
        return [Row(checkpoint, c, o) for at, c in self.paths if at == checkpoint for o in self.observables]

    def repeats(self, row: Row) -> bool:
        """Whether more of the row is signal than noise; one chain cannot tell."""
        return self.reliability.get(row, 0.0) >= MOSTLY_SIGNAL

    def chi(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """chi and its standard error [entry].

        Raises:
            ValueError: the table lacks the observable, or is of other entries.
        """
        names = [f"{kind}_{row.observable}" for kind in ("chi", "se")]
        table = self.run.table(self.paths[row.checkpoint, row.component], names)
        if table is None or table.num_rows != self.num_entries:
            raise ValueError(f"{row} at {row.checkpoint}: its table is not of the entries of the others")
        chi, error = (column(table, name).astype(np.float64) for name in names)
        return chi, error

    def context(self, entry: int) -> str:
        """The entry in its text, or what it is called."""
        index, (before, after) = self.index, _CONTEXT
        if self.text is not None and "position" in index:
            block, at = self.text.block(int(index["sequence_id"][entry])), int(index["position"][entry])
            left, right = self.text.running(block[max(0, at - 12) : at]), self.text.running(block[at + 1 : at + 6])
            return f"…{left[-before:]}[{self.text.visible(int(block[at]))}]{right[:after]}…"
        names = [name for name in ("sequence_id", "sample_id", "position", "token") if name in index]
        return ", ".join(f"{name.removesuffix('_id')} {index[name][entry]}" for name in names)

    def noise(self, rows: Sequence[Row]) -> str:
        """Why nothing is drawn of rows none of which repeats."""
        known = [self.reliability[row] for row in rows if row in self.reliability]
        best = f"is {number(max(known), decimals=2)} at best" if known else "is not known from one chain"
        what = listed(list(dict.fromkeys(row.observable for row in rows))[:4])
        return (
            f"χ of {what} is mostly noise: its split-half reliability {best}, below {number(MOSTLY_SIGNAL, 2)}, so "
            "no structure is drawn of it. More num_draws or num_chains bring it out."
        )


def _parts(subject: str) -> tuple[str, str]:
    checkpoint, _, component = subject.rpartition("/")
    return checkpoint or BASELINE, component


def more_than_chance(num_found: int, num_looked_at: int) -> bool:
    """Whether so many 95 % intervals exclude 0 that chance alone, of independent ones, hardly does it."""
    return num_found > 0 and float(scipy.special.bdtrc(num_found - 1, num_looked_at, _MISSED)) < CHANCE
