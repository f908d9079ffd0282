"""The susceptibilities: how large and how certain they are, the strongest entries, agreement of the estimators."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.report.blocks import Block, Figures, Heading, Note, Section, Table
from patterning_dist.report.colours import kinds_of
from patterning_dist.report.drawing import Drawing
from patterning_dist.report.figures import figure, scatter
from patterning_dist.report.heat_map import GROUPS, heat_map
from patterning_dist.report.modes import modes
from patterning_dist.report.passages import passages
from patterning_dist.report.probe import Probe
from patterning_dist.report.reading import Run, column, schema_json
from patterning_dist.report.svg import Plot, padded
from patterning_dist.report.text import INDEX, TokenText, entries, shades, split_of, strongest, varied
from patterning_dist.report.token_map import token_map
from patterning_dist.report.words import number

SHOWN_SUBJECTS, SHOWN_OBSERVABLES, ENTRIES_A_SIDE, CANDIDATES = 6, 4, 6, 200


def susceptibilities(
    section: Section,
    run: Run,
    diagnostics: Mapping[str, Any],
    solution: Mapping[str, Any],
    texts: Mapping[str, TokenText],
) -> None:
    """Size and reliability of every row of chi, its strongest entries, agreement of estimators, modes over heads."""
    tables = run.susceptibilities()
    if not diagnostics and not tables:
        return run.excuse(section, "No response has been estimated yet.")
    words = (
        "A susceptibility is minus the covariance of an observable with the loss of one sample, or of one of its "
        "tokens, under the localised posterior: where it is negative, more weight there lowers the observable."
    )
    section.blocks.append(Note(words))
    subjects = diagnostics.get("subjects") or {}
    drawn = _agreement(run, tables, solution.get("estimator_agreement") or {}, texts) + _reliability(subjects)
    section.blocks += [Figures(drawn)] if drawn else []
    probes = {name: table for name, path in tables.items() if (table := run.table(path)) is not None}
    first = next((table for table in probes.values() if table.num_rows), None)
    text = None if first is None else texts.get(split_of(first, texts) or "")
    section.blocks += _figures(run, diagnostics, texts)
    section.blocks += [*_sizes(probes), *_strongest(probes, text), *modes(run, diagnostics, text)]


def _figures(run: Run, diagnostics: Mapping[str, Any], texts: Mapping[str, TokenText]) -> list[Block]:
    """Map of the entries, mean chi by groups, and passages; the first of a sort in the open, others that show some."""
    blocks: list[Block] = []
    probe, groups = Probe.of(run, diagnostics, texts), run.table(GROUPS)
    if probe is not None:
        kinds: list[str | None] = [*kinds_of(probe.index)]
        for kind in kinds or [None]:
            blocks += _titled(token_map(probe, colour=kind), folded=bool(blocks))
    if groups is not None:
        names = sorted(set(groups["kind"].to_pylist()), key=lambda name: name != "pattern")
        observables = list(dict.fromkeys(groups["observable"].to_pylist()))[:SHOWN_OBSERVABLES]
        for number_, (name, observable) in enumerate(itertools.product(names, observables)):
            blocks += _titled(heat_map(groups, kind=name, observable=observable), folded=number_ > 0)
    if probe is not None and probe.text is not None and "position" in probe.index:
        blocks += _titled(passages(probe), folded=False)
    if blocks:
        words = "Alone, as SVG, and with their numbers as CSV: patterning_dist.open_run(…).plot draws the figures."
        blocks.append(Note(words, "small"))
    return blocks


def _titled(drawing: Drawing, folded: bool) -> list[Block]:
    """The blocks of a drawing under its title, or what is drawn in it folded."""
    if not folded:
        return [Heading(drawing.title), *drawing.blocks]
    return [replace(block, folded=drawing.title) for block in drawing.blocks if isinstance(block, Figures)]


def _rows_of(table: pa.Table) -> list[str]:
    return [name.removeprefix("chi_") for name in table.column_names if name.startswith("chi_")]


def _sizes(probes: Mapping[str, pa.Table]) -> list[Any]:
    """Spread of chi over the probe beside its error: a row of which the second is the larger is noise."""
    rows = []
    for subject, table in probes.items():
        for name in _rows_of(table):
            chi, error = (column(table, f"{kind}_{name}").astype(float) for kind in ("chi", "se"))
            if chi.size:
                noise = float(np.sqrt(np.mean(error**2)))
                rows.append([subject, name, number(chi.size), number(float(chi.std())), number(noise)])
    headers = ["subject", "observable", "probe entries", "spread of chi", "standard error"]
    return [Table(headers, rows, "Size of every row, and its error (root mean square)")] if rows else []


def _strongest(probes: Mapping[str, pa.Table], text: TokenText | None) -> list[Any]:
    """The entries at both ends of the first row of chi, of the first subjects."""
    blocks: list[Any] = []
    for subject, table in list(probes.items())[:SHOWN_SUBJECTS]:
        names = _rows_of(table)
        if not names or not table.num_rows:
            continue
        index = {name: column(table, name) for name in INDEX if name in table.column_names}
        chi, error = (column(table, f"{kind}_{names[0]}").astype(float) for kind in ("chi", "se"))
        words = [f"{number(c, sign=True)} ± {number(e, 2)}" for c, e in zip(chi, error, strict=True)]
        ends = [varied(text, index, strongest(chi, CANDIDATES, up), ENTRIES_A_SIDE) for up in (True, False)]
        rows = list(dict.fromkeys([*ends[0], *reversed(ends[1])]))
        title = f"{subject}: highest and lowest susceptibilities of {names[0]}"
        blocks.append(entries(title, "χ", index, chi, rows, words.__getitem__, shades(chi), text, folded=bool(blocks)))
    if len(probes) > SHOWN_SUBJECTS:
        more = f"Those of {len(probes) - SHOWN_SUBJECTS} more subjects are in the tables of response/."
        blocks.append(Note(more, "small"))
    return blocks


def _paired(
    run: Run, tables: Mapping[str, str], texts: Mapping[str, TokenText]
) -> tuple[str, dict[str, list[np.ndarray]]]:
    """Subject, and per observable the sample means of both estimators over the entries that both have.

    Nothing where the probe is not of the training pool: numbers of other samples must not be matched.
    """
    pool = run.table("response/pool.parquet")
    if pool is None or not tables:
        return "", {}
    given = str(schema_json(pool).get("subject"))
    name = given if given in tables else next(iter(tables))
    probe = run.table(tables[name])
    if probe is None or not probe.num_rows or not _same_samples(run, probe, texts):
        return "", {}
    key = "sequence_id" if "sequence_id" in probe.column_names else "sample_id"
    if key not in pool.column_names:  # of documents
        return "", {}
    places = _places(probe, key)
    _, ours, theirs = np.intersect1d(places, _places(pool, key), return_indices=True)
    observables = [row for row in _rows_of(probe) if f"chi_{row}" in pool.column_names]
    if ours.size < 3:
        return "", {}
    _, inverse = np.unique(places[ours] // 65536, return_inverse=True)
    sizes, both = np.bincount(inverse), ((probe, ours), (pool, theirs))
    return name, {
        o: [np.bincount(inverse, weights=column(t, f"chi_{o}")[rows]) / sizes for t, rows in both] for o in observables
    }


def _same_samples(run: Run, probe: pa.Table, texts: Mapping[str, TokenText]) -> bool:
    if texts:
        return split_of(probe, texts) == "train"
    return (run.config.get("sampling") or {}).get("probe", "unknown") is None


def _places(table: pa.Table, key: str) -> np.ndarray:
    position = column(table, "position") if "position" in table.column_names else 0
    return column(table, key).astype(np.int64) * 65536 + position


def _agreement(
    run: Run, tables: Mapping[str, str], agreement: Mapping[str, Any], texts: Mapping[str, TokenText]
) -> list[Any]:
    drawn: list[Any] = []
    subject, pairs = _paired(run, tables, texts) if agreement else ("", {})
    for name, (plain, direction) in pairs.items():
        given = agreement.get(name) or {}
        level = "samples" if "correlation_samples" in given else "entries"
        note = f"Means over the shared entries of {plain.size} samples, subject {subject}. "
        note += f"Over single entries r = {_estimate(given, 'correlation_', 'entries')}. The slope of the plain "
        note += f"covariance on the response direction is {_estimate(given, 'slope_', level)}: 1 where that leaves "
        note += "nothing out."
        title = f"{name}: the estimators agree with r = {_estimate(given, 'correlation_', level)} over {level}"
        axes = ("plain covariance (χ)", "response direction (χ)")
        drawn += figure(title, scatter(plain, direction, *axes, f"Agreement of estimators for {name}"), note)
    return drawn


def _estimate(given: Mapping[str, Any], what: str, level: str) -> str:
    prefix = what.replace("correlation_", "")
    value, interval = given.get(f"{what}{level}"), given.get(f"{prefix}interval_{level}")
    ends = f" [{number(interval[0], decimals=2)}, {number(interval[1], decimals=2)}]" if interval else ""
    return f"{number(value, decimals=2)}{ends}" if value is not None else "not computed"


def _reliability(subjects: Mapping[str, Any]) -> list[Any]:
    rows = [
        (subject, name, entry.get("reliability"), entry.get("reliability_samples"))
        for subject in subjects
        for kind in ("observables", "controlled")
        for name, entry in (subjects[subject].get(kind) or {}).items()
    ]
    rows = [row for row in rows if row[2] is not None or row[3] is not None]
    if not rows:
        return []
    several = len({row[1] for row in rows}) > 1
    names = [f"{subject} · {name}" if several else subject for subject, name, _, _ in rows]
    both = [value for row in rows for value in row[2:] if value is not None]
    label = "split-half correlation over disjoint chains"
    plot = Plot.of_rows(names, padded(both, include=[0, 1]), 24, x_label=label)
    plot.rule(x=0, style="zero")
    for index, (subject, name, entry, sample) in enumerate(rows):
        for value, style, words in (
            (entry, "reliability-token", "single losses"),
            (sample, "reliability-sequence", "sample means"),
        ):
            if value is not None:
                plot.dot(value, index + 0.5, style, 5, f"{subject}, {name}, {words}: {number(value)}")
    medians = [
        f"{number(float(np.median(found)), decimals=2)} over {words}"
        for words, values in (
            ("single losses", [entry for *_, entry, _ in rows]),
            ("sample means", [sample for *_, sample in rows]),
        )
        if (found := [value for value in values if value is not None])
    ]
    note = "Hollow: single losses; filled: means of samples, where these have several losses."
    return figure(f"Reliability: median {', '.join(medians)}", plot.svg("Split-half reliability of every row"), note)
