"""Map of the probe entries by their susceptibility vectors: principal components, one panel a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from markupsafe import Markup

from patterning_dist.report.blocks import Block, Figure, Figures, Note
from patterning_dist.report.colours import Colours, kinds_of
from patterning_dist.report.drawing import Drawing
from patterning_dist.report.figures import grid
from patterning_dist.report.probe import Probe, Row
from patterning_dist.report.svg import Plot, padded
from patterning_dist.report.words import number
from patterning_dist.response.modes import susceptibility_modes

POINTS, PANELS, SHOWN_LOADINGS = 2400, 6, 14
_INDEX = ("sequence_id", "sample_id", "position", "token", "domain", "label", "pattern")


def token_map(probe: Probe, *, colour: str | None = None, points: int = POINTS) -> Drawing:
    """Entries by their chi over components and observables, on the first two principal components.

    A row of chi is centred and divided by its standard error (root mean square over the entries), so that noise has
    variance 1 along every row. Rows that are mostly noise are left out. The axes are those of the first checkpoint at
    which two rows or more repeat, and hold for all panels; the largest loading of an axis is positive.

    Args:
        probe: of a run.
        colour: column of the probe that colours the points; default: the pattern of the token, else domain or label.
        points: drawn at most in all panels together, of a fixed random choice of entries; the axes are theirs.

    Raises:
        PatterningError: there is no such column.
    """
    kind = colour or next(iter(kinds_of(probe.index)), None)
    colours = Colours(probe.index, kind)
    kept = {c: [row for row in probe.rows(c) if probe.repeats(row)] for c in probe.checkpoints}
    title = f"Map of {'tokens' if 'position' in probe.index else 'samples'} by susceptibility"
    title += f", coloured by {kind}" if kind else ""
    drawn = [checkpoint for checkpoint, rows in kept.items() if len(rows) > 1]
    if not drawn:
        return Drawing(title, [Note(_missing(probe, kept))], {})
    shown = [drawn[k] for k in np.unique(np.linspace(0, len(drawn) - 1, PANELS).astype(int))]
    rows, chosen = kept[drawn[0]], _chosen(probe.num_entries, points // len(shown))
    vectors, noise = _vectors(probe, rows, chosen, np.ones(len(rows)))
    axes = susceptibility_modes(vectors / noise[:, None]).left[:, :2]
    places, labels = {}, {}
    for checkpoint in shown:
        there = [replace(row, checkpoint=checkpoint) for row in rows]
        here = np.array([row in kept[checkpoint] for row in there])
        vectors, errors = _vectors(probe, there, chosen, noise)
        vectors, errors = vectors * here[:, None], errors * here
        places[checkpoint] = axes.T @ vectors
        labels[checkpoint] = _labels(places[checkpoint], vectors, errors)
    ranges = [padded(np.concatenate([found[k] for found in places.values()])) for k in range(2)]
    tips = [f"{probe.context(int(k))} · {colours.groups[k]}" for k in chosen]
    styles = [colours.style(group) for group in colours.groups[chosen]]
    panels = list[Figure]()
    for checkpoint, place in places.items():
        caption = f"{checkpoint}: " if len(shown) > 1 else ""
        caption += _finding(colours, place[0], chosen, kind)
        panels.append(Figure(caption, _panel(place, ranges, labels[checkpoint], styles, tips, checkpoint)))
    panels.append(_loadings(axes, rows))
    words = _words(probe, rows, kept, shown, len(chosen))
    blocks: list[Block] = [Figures(panels, legend=colours.legend), Note(words, "small")]
    return Drawing(title, blocks, _numbers(probe, chosen, places, colours))


def _chosen(size: int, points: int) -> np.ndarray:
    """Entries that are drawn, in their order."""
    return np.sort(np.random.default_rng(0).choice(size, min(size, points), replace=False))


def _vectors(probe: Probe, rows: Sequence[Row], chosen: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centred chi of the chosen entries [row, point], and its error [row], both in units of every row's own.

    A row of the table at a time: all of them together may be large.
    """
    vectors, errors = np.empty((len(rows), len(chosen))), np.empty(len(rows))
    for k, row in enumerate(rows):
        chi, error = probe.chi(row)
        vectors[k] = (chi[chosen] - chi[chosen].mean()) / unit[k]
        errors[k] = np.sqrt(np.mean(error**2)) / unit[k]
    return vectors, errors


def _labels(place: np.ndarray, vectors: np.ndarray, errors: np.ndarray) -> list[str]:
    """Share of the variance along either axis, and whether noise could give as much.

    All rows follow the draws of few chains, and their noise may go few ways: the k-th of ordered variances that sum to
    that of all rows is at most a k-th of it.
    """
    variances, total, noise = place.var(axis=1), vectors.var(axis=1).sum(), (errors**2).sum()
    doubt = [", which noise alone could give" if variances[k] < noise / (k + 1) else "" for k in range(2)]
    return [f"axis {k + 1}: {100 * variances[k] / total:.0f} % of the variance{doubt[k]}" for k in range(2)]


def _finding(colours: Colours, place: np.ndarray, chosen: np.ndarray, kind: str | None) -> str:
    if kind is None:
        return "Losses by their susceptibilities"
    return f"{100 * colours.share_between(place, chosen):.0f} % of the variance along axis 1 lies between {kind}s"


def _panel(
    place: np.ndarray,
    ranges: Sequence[tuple[float, float]],
    labels: Sequence[str],
    styles: Sequence[str],
    tips: Sequence[str],
    checkpoint: str,
) -> Markup:
    plot = Plot(*ranges, height=380, x_label=f"{labels[0]} (standard errors)", y_label=labels[1], left=44)
    if ranges[0][0] < 0 < ranges[0][1]:
        plot.rule(x=0.0)
    if ranges[1][0] < 0 < ranges[1][1]:
        plot.rule(y=0.0)
    for x, y, style, tip in zip(*place, styles, tips, strict=True):
        plot.dot(x, y, f"point {style}", 2.6, tip)
    return plot.svg(f"Probe entries on two principal components of their susceptibilities at {checkpoint}")


def _loadings(axes: np.ndarray, rows: Sequence[Row]) -> Figure:
    """The rows that load most on either axis."""
    order = np.argsort(-np.abs(axes).max(axis=1), kind="stable")[:SHOWN_LOADINGS]
    names = [str(rows[k]) for k in order]
    largest = str(rows[int(np.argmax(np.abs(axes[:, 0])))])
    svg = grid(axes[order], names, ["axis 1", "axis 2"], "Loadings of the rows of chi on the axes of the map")
    left_out = f" {len(rows) - len(order)} rows with smaller ones are not shown." if len(order) < len(rows) else ""
    return Figure(f"Axis 1 loads most on {largest}", svg, f"Loadings: how much of a row is in an axis.{left_out}")


def _words(probe: Probe, rows: Sequence[Row], kept: dict[str, list[Row]], shown: Sequence[str], points: int) -> str:
    words = (
        f"Every point is one loss: its χ in {len(rows)} rows, each centred and in units of its standard error, along "
        f"the axes on which they differ most{f' at {rows[0].checkpoint}' if len(shown) > 1 else ''}."
    )
    if points < probe.num_entries:
        of = number(probe.num_entries, decimals=0)
        words += f" {number(points, decimals=0)} of {of} are drawn, chosen at random."
    noise = [str(row) for row in probe.rows(rows[0].checkpoint) if row not in rows]
    if noise:
        more = f" and {len(noise) - 4} more" if len(noise) > 4 else ""
        words += f" Left out, since they are mostly noise: {', '.join(noise[:4])}{more}."
    gone = [c for c in probe.checkpoints if len(kept[c]) < 2]
    if gone:
        words += f" Not drawn, since χ is mostly noise there: {', '.join(gone)}."
    return words


def _missing(probe: Probe, kept: dict[str, list[Row]]) -> str:
    rows = [row for checkpoint in probe.checkpoints for row in probe.rows(checkpoint)]
    if any(kept.values()):
        one = next(row for found in kept.values() for row in found)
        return f"A map takes two rows of χ that repeat, and only {one} does. Sample more components or observables."
    return probe.noise(rows)


def _numbers(
    probe: Probe, chosen: np.ndarray, places: dict[str, np.ndarray], colours: Colours
) -> dict[str, np.ndarray]:
    """A row a point and checkpoint."""
    columns = {name: probe.index[name][chosen] for name in _INDEX if name in probe.index}
    if probe.text is not None and "token" in columns:
        columns["text"] = np.array([probe.text.shown(int(token)) for token in columns["token"]], dtype=object)
    repeated = {name: np.tile(column, len(places)) for name, column in columns.items()}
    return {
        "checkpoint": np.repeat(list(places), len(chosen)),
        "entry": np.tile(chosen, len(places)),
        **repeated,
        "colour": np.tile(colours.groups[chosen], len(places)),
        **{f"axis_{k + 1}": np.concatenate([place[k] for place in places.values()]) for k in range(2)},
    }
