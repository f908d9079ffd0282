"""The chains: whether they have met, which were left out, their learning coefficients and their traces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patterning_dist.report.blocks import FLAG, Figures, Note, Section, Table
from patterning_dist.report.coefficients import coefficients
from patterning_dist.report.reading import Run
from patterning_dist.report.traces import Walk, rank_figures, trace_figures
from patterning_dist.report.words import Metrics, estimate, listed, number

LARGEST_RHAT, SMALLEST_ESS = 1.05, 100
DRAWN_SUBJECTS = 24  # a page that all heads of a large model are drawn on cannot be opened


def chains(
    section: Section, run: Run, summary: Mapping[str, Any], diagnostics: Mapping[str, Any], metrics: Metrics
) -> None:
    """Diagnostics with flags, learning coefficients, excluded chains, traces."""
    traces, states = (run.of_subjects(file, summary) for file in ("traces.parquet", "chains.json"))
    subjects = diagnostics.get("subjects") or {}
    if not traces and not subjects:
        return run.excuse(section, "No chains have been run yet.")
    if subjects:
        section.blocks += [*_convergence(subjects), *_coefficients(subjects), *_extrapolated(subjects)]
    excluded = {
        (name, entry["chain"]): entry.get("reason") or "no reason given"
        for name, path in states.items()
        for entry in run.json_list(path)
        if not entry.get("healthy", True)
    }
    excluded |= {(name, e["chain"]): e["reason"] for name in subjects for e in subjects[name].get("excluded") or []}
    if excluded:
        rows = [[subject, str(chain), why] for (subject, chain), why in excluded.items()]
        section.blocks.append(Table(["subject", "chain", "reason"], rows, "Chains left out"))
    elif states or subjects:
        section.blocks.append(Note("No chain was left out."))
    for index, (name, path) in enumerate(list(traces.items())[:DRAWN_SUBJECTS]):
        table = run.table(path)
        if table is not None and table.num_rows:
            walked = Walk.of(run, name, table)
            pairs = zip(trace_figures(walked, metrics), rank_figures(walked), strict=True)
            drawn = [figure for pair in pairs for figure in pair if figure is not None]
            section.blocks.append(Figures(drawn, folded="" if index == 0 else f"Traces and ranks of {name}"))
    if len(traces) > DRAWN_SUBJECTS:
        words = f"The traces of {len(traces) - DRAWN_SUBJECTS} more subjects are not drawn; they lie in sampling/."
        section.blocks.append(Note(words, "small"))


def _convergence(subjects: Mapping[str, Any]) -> list[Any]:
    rows: list[list[str]] = []
    slow: dict[str, None] = {}
    short: dict[str, None] = {}
    unknown = False
    for subject, entry in subjects.items():
        for name, values in (entry.get("observables") or {}).items():
            rhat, ess = values.get("rhat"), values.get("ess_bulk")
            bad_rhat, bad_ess = rhat is not None and not rhat <= LARGEST_RHAT, ess is not None and ess < SMALLEST_ESS
            unknown |= rhat is None or ess is None
            slow.update({subject: None} if bad_rhat else {})
            short.update({subject: None} if bad_ess else {})
            cells = [number(entry.get("num_chains"), decimals=0)]
            cells += [number(values.get(key)) for key in ("mean", "standard_deviation", "mcse")]
            cells += [(FLAG if bad_rhat else "") + number(rhat, decimals=3)]
            rows.append([subject, name, *cells, (FLAG if bad_ess else "") + number(ess, decimals=0)])
    headers = ["subject", "observable", "chains", "mean", "sd", "MCSE", "R-hat", "bulk ESS"]
    blocks: list[Any] = []
    if slow:
        words = f"{FLAG}R-hat above {LARGEST_RHAT} in {listed(list(slow))}: the chains have not met. "
        words += "Raise burn_in, or localization to hold them closer, or take more draws."
        blocks.append(Note(words))
    if short:
        words = f"{FLAG}Bulk ESS below {SMALLEST_ESS} in {listed(list(short))}: too few independent draws. "
        words += "Raise the number of draws or chains, or steps_between_draws."
        blocks.append(Note(words))
    if not slow and not short and not unknown:
        words = f"Every observable has R-hat at most {LARGEST_RHAT} and bulk ESS of at least {SMALLEST_ESS}."
        blocks.append(Note(words))
    return [*blocks, Table(headers, rows, "Convergence of every observable")]


def _coefficients(subjects: Mapping[str, Any]) -> list[Any]:
    """Local learning coefficients, a row a subject."""
    found = {name: entry["llc"] for name, entry in subjects.items() if entry.get("llc")}
    if not found:
        return []
    rows = [
        [
            name,
            estimate(value),
            estimate(subjects[name].get("temperature")),
            estimate(subjects[name].get("temperature_stiff")),
            estimate(subjects[name].get("step_bias")),
            number(subjects[name].get("num_coordinates"), decimals=0),
            ", ".join(dict.fromkeys(finding["mode"] for finding in subjects[name].get("findings") or [])) or "none",
        ]
        for name, value in found.items()
    ]
    headers = ["subject", "LLC [95 %]", "temperature [95 %]", "in stiff directions [95 %]", "LLC from steps [95 %]"]
    headers += ["free coordinates", "findings"]
    words = (
        "The temperature is 1 for the posterior, in the stiffest directions alone as well (with "
        "sampling.lanczos_steps); LLC from steps is what step size and minibatches make the LLC too large by, at most."
    )
    return [
        *coefficients(subjects).blocks,
        Table(headers, rows, "Local learning coefficients"),
        Note(words, "small"),
    ]


def _extrapolated(subjects: Mapping[str, Any]) -> list[Any]:
    """What chains at two step sizes say of step size 0."""
    rows = [
        [
            subject,
            name,
            *(estimate(part) for part in (one.get("full_step"), one.get("half_step"), one, one["bias"])),
            (FLAG if one.get("is_biased") else "") + number(one["bias_ratio"]),
        ]
        for subject, entry in subjects.items()
        for name, one in entry.get("extrapolated", {}).items()
    ]
    headers = ["subject", "answer", "at eps", "at eps / 2", "at 0", "difference", "eps off by, in standard errors"]
    title = "Extrapolated to step size 0 [95 %]; of chi the difference alone, root mean square without noise"
    return [Table(headers, rows, title)] if rows else []
