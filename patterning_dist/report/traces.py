"""Traces of chains with their burn-in, and rank plots: whether chains visit the same values equally often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from patterning_dist.report.blocks import Figure, Figures
from patterning_dist.report.drawing import Drawing
from patterning_dist.report.figures import trace_lines
from patterning_dist.report.reading import Run, column, schema_json
from patterning_dist.report.svg import Plot
from patterning_dist.report.words import Metrics, number
from patterning_dist.response.arviz import array_stats

MAX_BINS, MIN_DRAWS_A_BIN = 20, 8
SHOWN_CHAINS = 12  # more lines cannot be told apart


@dataclass(frozen=True)
class Walk:
    """The draws of the chains of a subject.

    Attributes:
        subject: its name.
        traces: quantity -> chain -> values in the order of the draws, deviations from the checkpoint.
        burn_in: steps before the first draw, and ``steps_between_draws``; 0 where the tables do not say.
    """

    subject: str
    traces: Mapping[str, Mapping[int, np.ndarray]]
    burn_in: int
    steps_between_draws: int

    @classmethod
    def of(cls, run: Run, subject: str, table: pa.Table) -> Walk:
        """From ``traces.parquet``; how the chains walked stands in the table of chi."""
        chain, draw = column(table, "chain"), column(table, "draw")
        rows = {int(c): (at := np.flatnonzero(chain == c))[np.argsort(draw[at])] for c in np.unique(chain)}
        traces = {
            name: {c: column(table, name)[at] for c, at in rows.items()}
            for name in table.column_names
            if name not in ("chain", "draw")
        }
        path = run.susceptibilities().get(subject)
        found = {} if path is None or (chi := run.table(path, [])) is None else schema_json(chi)
        return cls(subject, traces, int(found.get("burn_in", 0)), int(found.get("steps_between_draws", 0)))

    def steps(self, num_draws: int) -> np.ndarray:
        """Sampler step of every draw; its number where the steps are not known."""
        return self.burn_in + np.arange(num_draws) * (self.steps_between_draws or 1)

    @property
    def shown(self) -> list[int]:
        """Chains that are drawn, evenly chosen where there are many."""
        chains = sorted(self.traces["loss"])
        return [chains[k] for k in np.unique(np.linspace(0, len(chains) - 1, SHOWN_CHAINS).astype(int))]

    @property
    def chosen(self) -> str:
        """What is said where some are not drawn."""
        number_, shown = len(self.traces["loss"]), len(self.shown)
        return "" if shown == number_ else f" {shown} of {number_} chains are drawn, evenly chosen."

    def whole(self, quantity: str) -> tuple[list[int], np.ndarray]:
        """Chains that have all their draws, and their values [chain, draw]."""
        most = max(map(len, self.traces[quantity].values()))
        kept = [c for c, values in self.traces[quantity].items() if len(values) == most]
        return kept, np.stack([self.traces[quantity][c] for c in kept])


def traces(walk: Walk, metrics: Metrics) -> Drawing:
    """A line a chain against the sampler step, with the burn-in shaded."""
    steps, chains, draws = [], [], []
    for chain in walk.shown:
        values = walk.traces["loss"][chain]
        steps.append(walk.steps(len(values)))
        chains.append(np.full(len(values), chain))
        draws.append(np.arange(len(values)))
    numbers = {"chain": np.concatenate(chains), "draw": np.concatenate(draws), "step": np.concatenate(steps)}
    numbers |= {name: np.concatenate([found[c] for c in walk.shown]) for name, found in walk.traces.items()}
    return Drawing(f"Traces of {walk.subject}", [Figures(trace_figures(walk, metrics))], numbers)


def trace_figures(walk: Walk, metrics: Metrics) -> list[Figure]:
    """One a quantity."""
    drawn = []
    for quantity, found in walk.traces.items():
        words = quantity.replace("_", " ")
        unit = "nats" if quantity == "loss" else metrics.unit(quantity)
        label = f"{words} − value at centre{f' ({unit})' if unit else ''}"
        svg = trace_lines(
            [(walk.steps(len(found[c])), found[c]) for c in walk.shown],
            "sampler step" if walk.steps_between_draws else "draw",
            label,
            f"Traces of {quantity}, subject {walk.subject}",
            walk.burn_in,
        )
        note = f"Shaded: {walk.burn_in} steps of burn-in, without draws." if walk.burn_in else ""
        drawn.append(Figure(f"{walk.subject}: {words}", svg, (note + walk.chosen).strip()))
    return drawn


def ranks(walk: Walk) -> Drawing:
    """Rank plots of all quantities that move, Vehtari et al., Bayesian Analysis 16, 2021.

    All draws of all chains are ranked together; chains that sample one distribution have as many draws in every bin of
    ranks. The band is where 95 % of bins of such chains are, of as many independent draws as are effective.
    """
    columns: dict[str, list] = {name: [] for name in ("quantity", "chain", "bin", "share", "low", "high")}
    for quantity in walk.traces:
        if (found := rank_shares(walk.whole(quantity)[1])) is None:
            continue
        shares, half_width = found
        for chain, row in zip(walk.whole(quantity)[0], shares, strict=True):
            if chain not in walk.shown:
                continue
            for number_, share in enumerate(row):
                entry = (quantity, chain, number_, share, max(0.0, 1 - half_width), 1 + half_width)
                for name, value in zip(columns, entry, strict=True):
                    columns[name].append(value)
    drawn = [figure for figure in rank_figures(walk) if figure is not None]
    return Drawing(f"Ranks of the draws of {walk.subject}", [Figures(drawn)] if drawn else [], columns)


def rank_shares(values: np.ndarray) -> tuple[np.ndarray, float] | None:
    """Draws in every bin of ranks over the even share [chain, bin], and the half width of the 95 % band around 1.

    None where there is one chain, where draws are too few, or where nothing moves.

    Args:
        values: [chain, draw].
    """
    num_chains, num_draws = values.shape
    num_bins = min(MAX_BINS, num_draws // MIN_DRAWS_A_BIN)
    if num_chains < 2 or num_bins < 2 or np.ptp(values) == 0:
        return None
    ranks = values.ravel().argsort(kind="stable").argsort(kind="stable").reshape(values.shape)
    bins = ranks * num_bins // values.size
    counts = np.stack([np.bincount(row, minlength=num_bins) for row in bins])
    # Of every chain by itself: where chains disagree, effective draws of all together would widen the band to hide it.
    alone = [float(array_stats().ess(chain[None], method="mean")) for chain in values if np.ptp(chain)]
    effective = min(float(np.mean(alone)), num_draws)
    # A bin holds its share of a chain's draws without replacement from those of all chains.
    variance = (1 - 1 / num_bins) * (1 - 1 / num_chains) * num_bins / effective
    return counts * num_bins / num_draws, 1.96 * float(np.sqrt(variance))


def rank_figures(walk: Walk) -> list[Figure | None]:
    """One a quantity; None where there is nothing to rank."""
    drawn: list[Figure | None] = []
    for quantity in walk.traces:
        chains, values = walk.whole(quantity)
        found = rank_shares(values)
        if found is None:
            drawn.append(None)
            continue
        shares, half_width = found
        rhat = number(float(array_stats().rhat(values, method="rank")), decimals=3)
        outside = float(np.mean(np.abs(shares - 1) > half_width))
        title = f"Ranks of {quantity.replace('_', ' ')}: R-hat {rhat}, {100 * outside:.0f} % of bins outside the band"
        note = "A line a chain. Chains that agree are even, and 5 % of their bins lie outside the band by chance."
        kept = [k for k, chain in enumerate(chains) if chain in walk.shown]
        svg = _rank_plot([chains[k] for k in kept], shares[kept], half_width, walk.subject, quantity)
        drawn.append(Figure(title, svg, note + walk.chosen))
    return drawn


def _rank_plot(chains: list[int], shares: np.ndarray, half_width: float, subject: str, quantity: str) -> Markup:
    num_bins = shares.shape[1]
    top = max(2.0, float(shares.max()) * 1.08, 1 + 1.1 * half_width)
    label = f"rank of the draw, in {num_bins} bins"
    ticks = [(0.0, "lowest"), (float(num_bins), "highest")]
    y_label = "draws in a bin, over the even share"
    plot = Plot((0, num_bins), (0, top), x_label=label, y_label=y_label, left=58, right=26, height=195, x_ticks=ticks)
    plot.box((0, num_bins), (max(0.0, 1 - half_width), 1 + half_width), "neutral", 0.18, "where 95 % of even bins lie")
    plot.rule(y=1.0)
    edges = np.repeat(np.arange(num_bins + 1), 2)[1:-1]
    for index, row in enumerate(shares):
        plot.curve(edges, np.repeat(row, 2), f"trace trace-{index % 6}")
    return plot.svg(f"Rank plot of {quantity}, subject {subject}, chains {', '.join(map(str, chains))}")
