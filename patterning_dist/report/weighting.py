"""The weights of the arms: their spread, the tokens they act on most, and whole blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from patterning_dist.report.blocks import Figures, Lines, Note, Section, Table
from patterning_dist.report.figures import arm_style, figure, histogram
from patterning_dist.report.reading import ARM_ORDER, Run, column, in_order
from patterning_dist.report.text import Shading, TokenText, passage, strongest, varied
from patterning_dist.report.words import number

CONTEXT_LINES = 12
CANDIDATES = 600  # from which the lines are chosen, so that one frequent token does not fill them


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _bins(solved: dict[str, Any], arm: str) -> dict[str, Any] | None:
    return (solved.get(arm) or {}).get("histogram")


def _summary_table(solved: dict[str, Any]) -> Table:
    headers = [
        "arm",
        "strength",
        "largest feasible",
        "effective sample size",
        "share of all",
        "weight on the top 1 %",
        "at minimum",
        "at maximum",
        "residual",
    ]
    keys = ("strength", "largest_feasible_strength", "effective_sample_size")
    rows = []
    for arm in in_order(solved, ARM_ORDER):
        entry = solved[arm]
        rows.append(
            [
                arm,
                *[number(entry.get(key)) for key in keys],
                _share(entry.get("effective_sample_share")),
                _share(entry.get("top_percent_share")),
                *[number(entry.get(key), decimals=0) for key in ("num_at_minimum", "num_at_maximum")],
                number(entry.get("residual")),
            ]
        )
    return Table(headers, rows, "Solved weights")


def weights(run: Run, solution: dict[str, Any] | None, texts: dict[str, TokenText]) -> Section:
    """Section 4: histograms, effective sample size, strongest tokens in context, whole blocks."""
    section = Section("weights", "The weights")
    if solution is None:
        section.missing = "No weights have been solved yet."
        return section
    solved = solution.get("arms") or {}
    section.blocks.append(
        Note(
            "A weight multiplies a token's loss in training; 1 leaves it alone. "
            f"Estimator: {str(solution.get('estimator', 'not named')).replace('_', ' ')}."
        )
    )
    drawn = []
    same = bool(_bins(solved, "permuted")) and _bins(solved, "permuted") == _bins(solved, "plus")
    for arm in in_order(solved, ARM_ORDER):
        if arm == "permuted" and same:
            continue
        bins, share = _bins(solved, arm), solved[arm].get("effective_sample_share")
        if bins:
            svg = histogram(
                np.array(bins["edges"], dtype=float),
                np.array(bins["counts"], dtype=float),
                arm_style(arm),
                f"Histogram of {arm} weights",
            )
            drawn += figure(f"{arm.capitalize()}: the effective sample is {_share(share)} of the tokens", svg)
    if drawn:
        section.blocks.append(Figures(drawn))
    if same:
        section.blocks.append(
            Note(
                "The permuted arm has the plus arm's weights dealt to other tokens: same histogram.",
                "small",
            )
        )
    section.blocks.append(_summary_table(solved))
    if "train" not in texts:
        section.blocks.append(
            Note(
                "Their text cannot be shown: data/tokenizer.json or data/train.parquet is not there yet.",
                "small",
            )
        )
        return section
    for arm in ("plus", "minus"):
        table = run.table(f"weights/{arm}.parquet", ["sequence_id", "position", "weight"])
        if table is not None and table.num_rows:
            ids, positions, values = (column(table, name) for name in ("sequence_id", "position", "weight"))
            section.blocks += _tokens(texts["train"], arm, ids, positions, values, whole=arm == "plus")
    return section


def _tokens(
    text: TokenText, arm: str, ids: np.ndarray, positions: np.ndarray, values: np.ndarray, whole: bool
) -> list[Any]:
    """Strongest lines of one arm and, where wanted, its most shaded block and a middling one."""
    shading = Shading(values)
    blocks: list[Any] = []
    for largest, words in ((True, "most up-weighted"), (False, "most down-weighted")):
        order = strongest(values, CANDIDATES, largest)
        chosen = varied(text, ids, positions, order, CONTEXT_LINES)
        lines = [
            text.line(
                int(ids[i]),
                int(positions[i]),
                number(float(values[i]), decimals=2),
                *shading(float(values[i])),
            )
            for i in chosen
        ]
        blocks.append(Lines(f"{arm.capitalize()}: {words} tokens", "weight", lines, folded=not whole))
    if not whole:
        return blocks
    unique, inverse = np.unique(ids, return_inverse=True)
    spread = np.bincount(inverse, weights=np.abs(values - 1)) / np.bincount(inverse)
    ranked = np.argsort(spread)
    for index, words in (
        (ranked[-1], "the block it changes most"),
        (ranked[ranked.size // 2], "a block it changes by a middling amount"),
    ):
        rows = np.flatnonzero(inverse == index)
        chosen_weights = {int(positions[row]): float(values[row]) for row in rows}
        title = f"{arm.capitalize()}: {words} (sequence {unique[index]}, {text.domain(int(unique[index]))})"
        blocks.append(passage(text, int(unique[index]), chosen_weights, shading, title))
    blocks.insert(
        2,
        Note(
            "At most one line a block and two lines a token, so that frequent tokens leave room; "
            "among equal weights the choice is random.",
            "small",
        ),
    )
    return blocks
