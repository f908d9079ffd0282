"""The susceptibilities: agreement of the estimators, reliability, modes over heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.report.blocks import Figures, Lines, Note, Section
from patterning_dist.report.figures import figure, grid, scatter
from patterning_dist.report.reading import COMPONENT_ORDER, Run, column, in_order, schema_json
from patterning_dist.report.svg import Plot, padded
from patterning_dist.report.text import TokenText
from patterning_dist.report.words import label, number

SHOWN_MODES, TOKENS_A_SIDE = 3, 6


def susceptibilities(
    run: Run, diagnostics: dict[str, Any] | None, solution: dict[str, Any] | None, texts: dict[str, TokenText]
) -> Section:
    """Section 5: agreement of the estimators, reliability, modes over heads."""
    section = Section("susceptibilities", "Susceptibilities")
    probes = run.components("response", "susceptibility-*.parquet")
    probes = {name: path for name, path in probes.items() if not name.endswith("-sequences")}
    modes = run.table("response/modes.parquet")
    if diagnostics is None and not probes and modes is None:
        section.missing = "No response has been estimated yet."
        return section
    section.blocks.append(
        Note(
            "A susceptibility is minus the covariance of an observable with a token's loss under the "
            "localised posterior: where it is negative, more weight on the token lowers the observable."
        )
    )
    drawn = _agreement(run, (solution or {}).get("estimator_agreement") or {}, texts)
    drawn += _reliability((diagnostics or {}).get("components") or {})
    if drawn:
        section.blocks.append(Figures(drawn))
    if modes is None:
        section.blocks.append(Note("The modes over heads have not been computed yet.", "small"))
        return section
    section.blocks.append(Figures(_modes(modes, ((diagnostics or {}).get("modes") or {}).get("explained_variance"))))
    return _mode_tokens(run, section, probes, texts)


def _paired(run: Run, texts: dict[str, TokenText]) -> tuple[str, dict[str, list[np.ndarray]]] | None:
    """Component, and per observable the sequence means of both estimators over the tokens both have.

    None unless the probe's tokens are those of the training pool: ids of another split must not be matched.
    """
    pool = run.table("response/pool.parquet")
    probes = {
        n: p for n, p in run.components("response", "susceptibility-*.parquet").items() if not n.endswith("-sequences")
    }
    if pool is None or not probes or "train" not in texts:
        return None
    name = schema_json(pool).get("component")
    name = name if name in probes else next(iter(probes))
    probe = run.table(probes[name])
    if probe is None or not probe.num_rows or _split(probe, texts) != "train":
        return None
    observables = [c[4:] for c in probe.column_names if c.startswith("chi_") and c in pool.column_names]
    keys = [column(t, "sequence_id").astype(np.int64) * 65536 + column(t, "position") for t in (probe, pool)]
    _, ours, theirs = np.intersect1d(*keys, return_indices=True)
    if ours.size < 3:
        return None
    _, inverse = np.unique(keys[0][ours] // 65536, return_inverse=True)
    sizes = np.bincount(inverse)
    pairs = {
        o: [
            np.bincount(inverse, weights=column(t, f"chi_{o}")[rows]) / sizes
            for t, rows in ((probe, ours), (pool, theirs))
        ]
        for o in observables
    }
    return name, pairs


def _split(probe: pa.Table, texts: dict[str, TokenText]) -> str | None:
    """The split whose blocks hold the probe's tokens at the places it names."""
    rows = np.unique(np.linspace(0, probe.num_rows - 1, 20).astype(int))
    places = list(
        zip(
            *(column(probe, name)[rows].tolist() for name in ("sequence_id", "position", "token")),
            strict=True,
        )
    )
    return next((split for split, text in texts.items() if all(text.has(*place) for place in places)), None)


def _agreement(run: Run, agreement: dict[str, Any], texts: dict[str, TokenText]) -> list[Any]:
    paired = _paired(run, texts)
    drawn: list[Any] = []
    for name, (plain, direction) in (paired[1] if paired else {}).items():
        given = agreement.get(name) or {}
        note = f"Means over the shared tokens of {plain.size} sequences, component {paired[0]}. " if paired else ""
        note += f"Per token r = {_correlation(given, 'tokens')}."
        title = f"{label(name)}: the estimators agree with r = {_correlation(given, 'sequences')} over sequences"
        units = "χ, nats²"
        svg = scatter(
            plain,
            direction,
            f"plain covariance ({units})",
            f"response direction ({units})",
            f"Agreement of estimators for {name}",
        )
        drawn += figure(title, svg, note)
    return drawn


def _correlation(given: dict[str, Any], kind: str) -> str:
    value, interval = given.get(f"correlation_{kind}"), given.get(f"interval_{kind}")
    ends = f" [{number(interval[0], decimals=2)}, {number(interval[1], decimals=2)}]" if interval else ""
    return f"{number(value, decimals=2)}{ends}" if value is not None else "not computed"


def _reliability(components: dict[str, Any]) -> list[Any]:
    rows = [
        (component, name, entry.get("reliability"), entry.get("reliability_sequences"))
        for component in in_order(components, COMPONENT_ORDER)
        for name, entry in (components[component].get("observables") or {}).items()
    ]
    rows = [row for row in rows if row[2] is not None or row[3] is not None]
    if not rows:
        return []
    names = [
        f"{component} · {name}" if len({row[1] for row in rows}) > 1 else component for component, name, _, _ in rows
    ]
    both = [value for row in rows for value in row[2:] if value is not None]
    plot = Plot(
        padded(both, include=[0, 1]),
        (len(rows), 0),
        rows=names,
        left=min(230, 14 + int(6.5 * max(map(len, names)))),
        height=48 + 24 * len(rows),
        x_label="split-half correlation over disjoint chains",
    )
    plot.rule(x=0, style="zero")
    for index, (component, name, token, sequence) in enumerate(rows):
        for value, style, words in (
            (token, "reliability-token", "tokens"),
            (sequence, "reliability-sequence", "sequences"),
        ):
            if value is not None:
                plot.dot(value, index + 0.5, style, 5, f"{component}, {name}, {words}: {number(value)}")
    medians = [
        number(float(np.median(known)), decimals=2)
        for values in ([token for *_, token, _ in rows], [sequence for *_, sequence in rows])
        if (known := [value for value in values if value is not None])
    ]
    title = f"Reliability: median {' per token, '.join(medians)}{' per sequence' if len(medians) == 2 else ''}"
    return figure(title, plot.svg("Split-half reliability of every row"), "Hollow: per token; filled: per sequence.")


def _modes(modes: pa.Table, explained: list[float] | None) -> list[Any]:
    values = column(modes, "singular_value").astype(float)
    shares = np.array(explained, dtype=float) if explained else values**2 / max(float((values**2).sum()), 1e-300)
    heads = in_order([c for c in modes.column_names if c not in ("mode", "singular_value")], COMPONENT_ORDER)
    plot = Plot(
        (0, values.size),
        (0, float(values.max()) * 1.1 or 1.0),
        x_label="mode",
        y_label="singular value",
        columns=[str(m) for m in column(modes, "mode").tolist()],
    )
    for index, value in enumerate(values):
        plot.box(
            (index + 0.15, index + 0.85),
            (0, value),
            "neutral",
            1.0,
            f"singular value {number(value)}, {100 * shares[index]:.0f} % of the variance",
        )
    count = min(values.size, 8)
    loadings = np.stack([column(modes, head)[:count] for head in heads])
    largest = heads[int(np.argmax(np.abs(loadings[:, 0])))]
    drawn = figure(
        f"The first mode carries {100 * shares[0]:.0f} % of the variance",
        plot.svg("Singular values of the modes"),
    )
    names = [str(m) for m in column(modes, "mode").tolist()[:count]]
    return drawn + figure(
        f"The first mode loads most on {largest}",
        grid(loadings, heads, names, "Loadings of heads on modes", tip=" (mode)", x_label="mode"),
    )


def _mode_tokens(run: Run, section: Section, probes: dict[str, str], texts: dict[str, TokenText]) -> Section:
    table = run.table("response/mode-tokens.parquet", ["mode", "sign", "rank", "sequence_id", "position", "score"])
    probe = run.table(next(iter(probes.values()))) if probes else None
    split = _split(probe, texts) if probe is not None and probe.num_rows else None
    if table is None or split is None:
        section.blocks.append(
            Note("The modes' tokens cannot be shown: their text or their table is not there yet.", "small")
        )
        return section
    rows = sorted(table.to_pylist(), key=lambda row: (row["mode"], row["rank"]))
    largest = max((abs(row["score"]) for row in rows), default=1.0) or 1.0
    for mode in sorted({row["mode"] for row in rows})[:SHOWN_MODES]:
        chosen = [
            [row for row in rows if row["mode"] == mode and (row["score"] > 0) == up][:TOKENS_A_SIDE]
            for up in (True, False)
        ]
        lines = [
            texts[split].line(
                row["sequence_id"],
                row["position"],
                number(row["score"], sign=True),
                "up" if row["score"] > 0 else "down",
                abs(row["score"]) / largest,
            )
            for row in [*chosen[0], *reversed(chosen[1])]
        ]
        section.blocks.append(Lines(f"Mode {mode}: tokens with the highest and the lowest scores", "score", lines))
    return section
