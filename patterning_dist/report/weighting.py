"""The weights of the arms: their spread, the samples or tokens they act on most, and whole blocks of text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.report.blocks import Figures, Note, Piece, Section, Table
from patterning_dist.report.controls import controls_table
from patterning_dist.report.figures import arm_style, figure, histogram
from patterning_dist.report.reading import ARM_ORDER, Run, column, in_order
from patterning_dist.report.text import INDEX, Shading, TokenText, entries, passage, strongest, varied
from patterning_dist.report.words import estimate, listed, number

CONTEXT_LINES = 12
CANDIDATES = 600  # from which the lines are chosen, so that one frequent token does not fill them


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _bins(solved: Mapping[str, Any], arm: str) -> dict[str, Any] | None:
    return (solved.get(arm) or {}).get("histogram")


def _summary_table(solved: Mapping[str, Any], title: str) -> Table:
    headers = ["arm", "strength", "largest feasible", "effective sample size", "share of all", "weight on the top 1 %"]
    headers += ["at minimum", "at maximum", "residual"]
    rows = []
    for arm in in_order(solved, ARM_ORDER):
        entry = solved[arm]
        keys = ("strength", "largest_feasible_strength", "effective_sample_size")
        cells = [number(entry.get(key)) for key in keys]
        cells += [_share(entry.get(key)) for key in ("effective_sample_share", "top_percent_share")]
        cells += [number(entry.get(key), decimals=0) for key in ("num_at_minimum", "num_at_maximum")]
        rows.append([arm, *cells, number(entry.get("residual"))])
    return Table(headers, rows, title)


def _choice(solution: Mapping[str, Any]) -> str:
    """How the component was chosen, and how well its scores repeat."""
    words, rises = "", solution.get("mean_rises") or {}
    if rises:
        each = ", ".join(f"{name} {number(rise)}" for name, rise in sorted(rises.items(), key=lambda item: -item[1]))
        words = f" {solution['subject']} was chosen since disturbing it raises the mean loss most (nats: {each})."
    for name, value in (solution.get("reliability") or {}).items():
        made_of = solution["replicates"]
        words += (
            f" The scores of {name} from {made_of['number']} {made_of['of']} repeat from half to half of them with "
        )
        words += f"r = {number(value, decimals=2)}." if value is not None else "an r that one alone does not tell."
    return words


def weights(
    section: Section, run: Run, summary: Mapping[str, Any], solution: Mapping[str, Any], texts: Mapping[str, TokenText]
) -> None:
    """Histograms, effective sample size, what is weighted most and least, whole blocks."""
    if not solution:
        absent = "The experiment file has no section solve, so there are no weights."
        return run.excuse(section, "No weights have been solved yet.", absent, "solve")
    solved = solution.get("arms") or {}
    words = "A weight multiplies a loss in training, or the chance that a sample is drawn; 1 leaves it alone. "
    words += f"Estimator: {str(solution.get('estimator', 'not named')).replace('_', ' ')}.{_choice(solution)}"
    if kept := solution.get("kept_mass"):
        words += f" {listed(kept['arms']).capitalize()} keep the sum of weights of every {kept['of']}, "
        words += f"{number(kept['num_groups'], decimals=0)} of them, as it is in the data."
    for arm in in_order(solved, ARM_ORDER):
        if cost := solved[arm].get("cost"):
            words += (
                f" {arm.capitalize()} is scaled to {number(cost['scale'])} of what was solved for, where the window "
            )
            words += (
                f"is predicted to raise the overall loss by {estimate(cost['overall'], sign=True)} nats: the upper "
            )
            words += f"end is held to {number(cost['max_cost'])}; {len(cost['tried'])} strengths were tried."
    section.blocks.append(Note(words))
    same = [arm for arm in solved if arm != "plus" and _bins(solved, arm) == _bins(solved, "plus")]
    drawn = []
    for arm in in_order(solved, ARM_ORDER):
        bins, share = _bins(solved, arm), solved[arm].get("effective_sample_share")
        if bins and arm not in same:
            edges, counts = (np.array(bins[key], dtype=float) for key in ("edges", "counts"))
            svg = histogram(edges, counts, arm_style(arm), f"Histogram of {arm} weights")
            drawn += figure(f"{arm.capitalize()}: the effective sample is {_share(share)} of the losses", svg)
    section.blocks += [Figures(drawn)] if drawn else []
    if "permuted" in same and _bins(solved, "permuted"):
        words = "The permuted arm has the plus arm's weights dealt to other losses"
        words += f" of the same {kept['of']}: same histogram." if kept else ": same histogram."
        section.blocks.append(Note(words, "small"))
    section.blocks.append(_summary_table(solved, "Solved weights"))
    if (controls := controls_table(solution)) is not None:
        section.blocks.append(controls)
    if later := summary.get("rounds"):
        title = "Weights of later rounds, solved for at the checkpoint where the round before has ended"
        section.blocks.append(_summary_table(later, title))
    text = texts.get("train")
    if text is None:
        section.blocks.append(Note("This run has no text of its own, so samples go by their numbers.", "small"))
    for arm in ("plus", "minus"):
        table = run.table(f"weights/{arm}.parquet")
        if table is not None and table.num_rows:
            section.blocks += _strongest(arm, table, text)


def _strongest(arm: str, table: pa.Table, text: TokenText | None) -> list[Any]:
    """Strongest rows of one arm and, of text, its most shaded block and a middling one."""
    index = {name: column(table, name) for name in INDEX if name in table.column_names}
    values = column(table, "weight")
    shading, blocks = Shading(values), []

    def words(row: int) -> str:
        return number(float(values[row]), decimals=2)

    for largest, which in ((True, "most up-weighted"), (False, "most down-weighted")):
        rows = varied(text, index, strongest(values, CANDIDATES, largest), CONTEXT_LINES)
        title = f"{arm.capitalize()}: {which} {'tokens' if 'position' in index else 'samples'}"
        blocks.append(entries(title, "weight", index, values, rows, words, shading, text, folded=arm != "plus"))
    if arm != "plus" or text is None or "position" not in index:
        return blocks
    note = "At most one line a block and two lines a token, so that frequent tokens leave room; among equal weights "
    note += "the choice is random."
    return [*blocks, Note(note, "small"), *_passages(arm, index, values, shading, text)]


def _passages(
    arm: str, index: Mapping[str, np.ndarray], values: np.ndarray, shading: Shading, text: TokenText
) -> list[Any]:
    unique, inverse = np.unique(index["sequence_id"], return_inverse=True)
    spread = np.bincount(inverse, weights=np.abs(values - 1)) / np.bincount(inverse)
    ranked, found = np.argsort(spread), []
    for block, words in (
        (ranked[-1], "the block it changes most"),
        (ranked[ranked.size // 2], "a block it changes by a middling amount"),
    ):
        chosen = {int(index["position"][row]): float(values[row]) for row in np.flatnonzero(inverse == block)}
        sequence_id = int(unique[block])
        title = f"{arm.capitalize()}: {words} (sequence {sequence_id}, {text.domain(sequence_id)})"
        ends = number(shading.low), "1", number(shading.high)
        found.append(passage(text, sequence_id, partial(_piece, chosen, shading), title, ends, "weight"))
    return found


def _piece(
    weights: Mapping[int, float], shading: Shading, position: int, words: str, visible: str, breaks: bool
) -> Piece:
    """A token shaded by its weight; one without (the first) is blank."""
    if position not in weights:
        return Piece(words, tip="not predicted", breaks=breaks)
    weight = weights[position]
    return Piece(words, *shading(weight), f"{visible} weight {number(weight)}", breaks)
