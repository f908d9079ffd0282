"""The chains: whether they have met, which were left out, and their traces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.report.blocks import FLAG, Figures, Note, Section, Table
from patterning_dist.report.figures import figure
from patterning_dist.report.reading import COMPONENT_ORDER, Run, column, in_order
from patterning_dist.report.svg import Plot, padded
from patterning_dist.report.words import listed, number

LARGEST_RHAT, SMALLEST_ESS = 1.05, 100
TRACE_POINTS = 240


def chains(run: Run, diagnostics: dict[str, Any] | None) -> Section:
    """Section 6: diagnostics with flags, excluded chains, traces."""
    section = Section("chains", "Chains")
    traces = run.components("sampling", "*/traces.parquet")
    components = (diagnostics or {}).get("components") or {}
    if not traces and not components:
        section.missing = "No chains have been run yet."
        return section
    if components:
        section.blocks += _diagnostics_table(components)
    states = run.components("sampling", "*/chains.json")
    excluded = {
        (name, entry["chain"]): entry.get("reason") or "no reason given"
        for name, path in states.items()
        for entry in run.json_list(path)
        if not entry.get("healthy", True)
    }
    excluded |= {(name, e["chain"]): e["reason"] for name in components for e in components[name].get("excluded") or []}
    if excluded:
        section.blocks.append(
            Table(
                ["component", "chain", "reason"],
                [[c, str(k), why] for (c, k), why in excluded.items()],
                "Chains left out",
            )
        )
    elif states or components:
        section.blocks.append(Note("No chain was left out."))
    for index, (name, path) in enumerate(traces.items()):
        table = run.table(path)
        if table is not None and table.num_rows:
            section.blocks.append(Figures(_traces(name, table), folded="" if index == 0 else f"Traces of {name}"))
    return section


def _diagnostics_table(components: dict[str, Any]) -> list[Any]:
    rows, slow, short, unknown = [], set(), set(), False
    for component in in_order(components, COMPONENT_ORDER):
        entry = components[component]
        for name, values in (entry.get("observables") or {}).items():
            rhat, ess = values.get("rhat"), values.get("ess_bulk")
            bad_rhat, bad_ess = (
                rhat is not None and not rhat <= LARGEST_RHAT,
                ess is not None and not ess >= SMALLEST_ESS,
            )
            unknown |= rhat is None or ess is None
            slow |= {component} if bad_rhat else set()
            short |= {component} if bad_ess else set()
            rows.append(
                [
                    component,
                    name,
                    number(entry.get("num_chains"), decimals=0),
                    number(values.get("mean")),
                    number(values.get("standard_deviation")),
                    number(values.get("mcse")),
                    (FLAG if bad_rhat else "") + number(rhat, decimals=3),
                    (FLAG if bad_ess else "") + number(ess, decimals=0),
                    number(entry.get("max_token_rhat"), decimals=2),
                ]
            )
    headers = [
        "component",
        "observable",
        "chains",
        "mean",
        "sd",
        "MCSE",
        "R-hat",
        "bulk ESS",
        "largest token R-hat",
    ]
    blocks: list[Any] = []
    if slow:
        blocks.append(
            Note(
                f"{FLAG}R-hat above {LARGEST_RHAT} in {listed(sorted(slow))}: the chains have not met. "
                "Raise burn_in, or localization to hold them closer, or take more draws."
            )
        )
    if short:
        blocks.append(
            Note(
                f"{FLAG}Bulk ESS below {SMALLEST_ESS} in {listed(sorted(short))}: too few independent draws. "
                "Raise the number of draws or chains, or steps_between_draws."
            )
        )
    if not slow and not short and not unknown:
        blocks.append(
            Note(f"Every observable has R-hat at most {LARGEST_RHAT} and bulk ESS of at least {SMALLEST_ESS}.")
        )
    return [*blocks, Table(headers, rows, "Convergence of every observable")]


def _traces(name: str, table: pa.Table) -> list[Any]:
    chain, draw = column(table, "chain"), column(table, "draw")
    drawn: list[Any] = []
    for quantity in [c for c in table.column_names if c not in ("chain", "draw")]:
        values = column(table, quantity)
        plot = Plot(
            (float(draw.min()), float(max(draw.max(), draw.min() + 1))),
            padded(values),
            x_label="draw",
            y_label=f"{quantity.replace('_', ' ')} − value at centre (nats)",
            left=56,
            height=200,
        )
        plot.rule(y=0.0) if plot.y_range[0] < 0 < plot.y_range[1] else None
        for index, number_ in enumerate(np.unique(chain)):
            rows = np.flatnonzero(chain == number_)
            rows = rows[np.argsort(draw[rows])][:: max(1, -(-rows.size // TRACE_POINTS))]
            plot.curve(draw[rows], values[rows], f"trace trace-{index % 6}")
        drawn += figure(f"{name}: {quantity.replace('_', ' ')}", plot.svg(f"Traces of {quantity}, component {name}"))
    return drawn
