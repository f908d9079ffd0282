"""What was asked and what came out: a row an arm and target, one sentence, and the differences between the arms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from patterning_dist.report.blocks import Note, Section, Table
from patterning_dist.report.differences import Contrasts, differences, factors, in_words, oracle_table
from patterning_dist.report.frontier import frontiers
from patterning_dist.report.reading import ARM_ORDER, Run, in_order, interval_of
from patterning_dist.report.words import Metrics, change, clear, estimate, listed, number
from patterning_dist.response.contrast import parts_of

_DIRECTIONS = {"up": "up", "down": "down", "hold": "unmoved"}
_SOURCES = {
    "halving": "the window in half its segments",
    "model": "what the window leaves out",
    "sequences": "held-out samples",
}


def headline_table(rows: Sequence[Mapping[str, Any]], metrics: Metrics) -> tuple[Table, list[str]]:
    """A row for every arm and target, with what was asked and came out, and why something is not there.

    What no row has anything of is no column but a reason, unless that is a window that was left.
    """
    cells, reasons = [], dict[str, int]()
    kinds = {"solved": "solved for", "predicted": "predicted", "checked": "checked", "realised": "realised"}
    empty = [kind for kind in kinds if all(": " not in row[kind].get("missing", ": ") for row in rows)]
    told_once = [f"Not {kind}: {'; '.join(dict.fromkeys(row[kind]['missing'] for row in rows))}." for kind in empty]

    def described(value: Mapping[str, Any]) -> str:
        if "missing" not in value:
            return in_words(value)
        head, colon, _ = value["missing"].partition(": ")
        return f"{head if colon else '–'} ({reasons.setdefault(value['missing'], len(reasons) + 1)})"

    for row in rows:
        name, asked, share = metrics.in_sentence(row["target"]), row["asked"], row["solved"].get("share")
        parts = [f"{metrics.term(part)} {_latest(found)}" for part, found in row["parts"].items() if found]
        cells.append(
            [
                row["arm"],
                f"{name} {_DIRECTIONS[asked['direction']]}" if asked else f"nothing of {name}",
                *(
                    described(row[kind]) + (f" at share {number(share, 2)}" if share and kind == "solved" else "")
                    for kind in kinds
                    if kind not in empty
                ),
                ", ".join(parts) or "–",
                _latest(row["cost"]),
            ]
        )
    columns = [words for kind, words in kinds.items() if kind not in empty]
    headers = ["arm", "asked", *columns, "of which", "cost in overall loss"]
    # An interval may stand below its value, so that seven columns are one screen wide.
    shown = [[cell.replace("\u00a0[", " [") for cell in line] for line in cells]
    return Table(headers, shown), [f"({number}) {reason}." for reason, number in reasons.items()] + told_once


def _latest(found: Mapping[str, Any]) -> str:
    """What was realised; else what was checked or predicted, and that it is no more."""
    if "realised" in found:
        return in_words(found["realised"])
    kind = next((kind for kind in ("checked", "predicted") if kind in found), None)
    return f"{in_words(found[kind])} ({kind})" if kind else "–"


def _verdict(contrasts: Contrasts, solution: Mapping[str, Any], summary: Mapping[str, Any], metrics: Metrics) -> str:
    """An arm on the metric that its weights were solved for most, and on what they were to hold: the numbers alone."""
    solved, arms = solution.get("arms") or {}, summary.get("arms") or {}
    sentences: list[str] = []
    for arm in in_order(contrasts, ARM_ORDER):
        (other, values), *controls = contrasts[arm].items()
        target = (solved.get((arms.get(arm) or {}).get("weights") or arm) or {}).get("target") or {}
        aimed = {name: value for name, value in target.items() if value and name in values}
        if target and not aimed:
            rows = (row for row in summary.get("headline") or [] if row["arm"] == arm and row["asked"] is None)
            aimed = {row["target"]: 0.0 for row in rows if row["target"] in values}
        if not aimed:
            continue
        metric = max(aimed, key=lambda name: abs(aimed[name]))
        weights = f"the {arm} weights" + ("" if aimed[metric] else ", of which that was not asked,")
        change = f"With {weights} training {_change(metric, values[metric], metrics)} compared with {other}"
        if terms := parts_of(metric, values):
            change += (
                f", of which {listed([f'{metrics.term(name)} {estimate(values[name], sign=True)}' for name in terms])}"
            )
        against = {name: values[metric] for name, values in controls if metric in values}
        sentences.append(", ".join([change, *_judged(aimed[metric], values[metric], against)]) + ".")
        moved = [name for name, value in target.items() if value == 0 and name in values and clear(values[name])]
        if moved:
            changes = listed([_change(name, values[name], metrics) for name in moved])
            sentences.append(f"What was to stay unmoved was not: training {changes}.")
    return " ".join(sentences)


def _judged(wanted: float, found: dict[str, Any], controls: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    if wanted and clear(found):
        as_asked = clear(found) == (1 if wanted > 0 else -1)
        yield "as asked" if as_asked else "which is the opposite of what was asked"
    for other, against in controls.items():
        tail = "and the same holds" if clear(against) == clear(found) else "and it differs"
        if not clear(against):
            tail = "but there is no clear difference"
        yield f"{tail} against {other} ({change(against)})"


def _change(metric: str, value: dict[str, Any], metrics: Metrics) -> str:
    if interval_of(value.get("ratio") or value) is None:
        return f"moved {metrics.effect(metric, value).replace(' moved', '', 1)}"
    return metrics.effect(metric, value) if clear(value) else f"had {metrics.effect(metric, value)}"


def headline(
    section: Section, run: Run, summary: Mapping[str, Any], solution: Mapping[str, Any], metrics: Metrics
) -> None:
    """One row an arm and target, one sentence, contrasts as forest plots."""
    rows, contrasts = summary.get("headline") or [], summary.get("contrasts") or {}
    if not rows and not contrasts:
        absent = "This experiment measures; it asks for no weights and trains no arms."
        missing = "No weights have been solved and no arms compared."
        return run.excuse(section, missing, absent, "solve", "retrain")
    if rows:
        table, reasons = headline_table(rows, metrics)
        section.blocks += [table, Note(" ".join([*reasons, _covered(rows)]), "small")]
    if verdict := _verdict(contrasts, solution, summary, metrics):
        section.blocks.append(Note(verdict, "lead"))
    if contrasts:
        shares = summary.get("oracle_shares") or {}
        if found := factors(contrasts, shares, metrics):
            words = "A factor is the geometric mean over shared seeds, paired; its interval, of Student’s t on the "
            section.blocks.append(Note(" ".join([*(f"{one}." for one in found), f"{words}logarithms, covers seeds."])))
        section.blocks += frontiers(summary.get("frontier") or {}, contrasts, metrics)
        section.blocks += [*differences(contrasts, metrics), *oracle_table(shares, metrics)]
    elif run.leaves_out("retrain"):
        section.blocks.append(Note("The experiment file has no section retrain: no arms are compared.", "small"))
    else:
        section.blocks.append(Note("The comparison of the arms has not been run yet.", "small"))


def _covered(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the 95 % intervals of every column cover, as the estimates themselves say."""
    found = {
        kind: list(dict.fromkeys(name for row in rows for name in row[kind].get("covers") or ()))
        for kind in ("solved", "predicted", "checked", "realised")
    }
    words = [f"{kind} {listed([_SOURCES.get(name, name) for name in names])}" for kind, names in found.items() if names]
    return (
        f"95 % intervals cover: {'; '.join(words) or 'nothing'}. Solved for is the linear response at the checkpoint, "
        "on the held-out samples that the observables are made of; predicted and checked are on other ones, realised "
        "and the cost on a third set."
    )
