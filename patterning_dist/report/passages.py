"""Whole probe sequences with every token coloured by chi, as far as its error allows."""

from __future__ import annotations

import numpy as np

from patterning_dist.errors import PatterningError
from patterning_dist.report.blocks import Block, Note, Passage, Piece
from patterning_dist.report.drawing import Drawing
from patterning_dist.report.probe import Probe, Row, more_than_chance
from patterning_dist.report.text import passage
from patterning_dist.report.words import number

CLEAR = 2.0  # standard errors; below, a token has no colour


def passages(
    probe: Probe,
    *,
    observable: str | None = None,
    component: str | None = None,
    checkpoint: str | None = None,
    count: int = 2,
) -> Drawing:
    """The sequences with most tokens whose chi is clear of 0, every token in colour whose |chi| is 2 errors or more.

    Args:
        probe: of a run that keeps its text.
        observable, component, checkpoint: of the row of chi; default: the row that repeats best.
        count: of sequences.

    Raises:
        PatterningError: there is no such row, or the run has no text.
    """
    row = _row(probe, observable, component, checkpoint)
    title = f"χ of “{row.observable}” in its text, component {row.component}"
    title += f" at {row.checkpoint}" if len(probe.checkpoints) > 1 else ""
    if probe.text is None or "position" not in probe.index:
        raise PatterningError(f"{title}: the run keeps no text of its probe, so there are no passages")
    chi, error = probe.chi(row)
    is_clear = np.abs(chi) >= CLEAR * error
    if not probe.repeats(row):
        return Drawing(title, [Note(probe.noise([row]))], {})
    if not more_than_chance(int(is_clear.sum()), chi.size):
        words = f"{title}: {is_clear.sum()} of {chi.size} tokens are 2 standard errors from 0, as many as chance gives."
        return Drawing(title, [Note(words)], {})
    largest = float(np.abs(chi[is_clear]).max())
    inverse = np.unique(probe.index["sequence_id"], return_inverse=True)[1]
    order = np.argsort(-np.bincount(inverse, weights=is_clear), kind="stable")[:count]
    blocks: list[Block] = []
    for sequence in order:
        entries = np.flatnonzero(inverse == sequence)
        blocks.append(_passage(probe, entries, chi, error, largest))
    words = (
        "Blue: more weight on the token raises the observable; orange: it lowers it. A token has no colour where |χ| "
        "is below 2 standard errors, or where it has no loss in the probe."
    )
    drawn = np.concatenate([np.flatnonzero(inverse == sequence) for sequence in order])
    numbers = {
        "sequence_id": probe.index["sequence_id"][drawn],
        "position": probe.index["position"][drawn],
        "text": [probe.text.shown(int(_token(probe, k))) for k in drawn],
        "chi": chi[drawn],
        "standard_error": error[drawn],
        "coloured": is_clear[drawn],
    }
    return Drawing(title, [*blocks, Note(words, "small")], numbers)


def _row(probe: Probe, observable: str | None, component: str | None, checkpoint: str | None) -> Row:
    rows = [row for at in probe.checkpoints for row in probe.rows(at)]
    found = [
        row
        for row in rows
        if observable in (None, row.observable)
        and component in (None, row.component)
        and checkpoint in (None, row.checkpoint)
    ]
    if not found:
        raise PatterningError(
            f"χ: no row of observable {observable}, component {component}, checkpoint {checkpoint}; there are "
            f"{', '.join(probe.observables)} of {', '.join(probe.components)} at {', '.join(probe.checkpoints)}"
        )
    return max(found, key=lambda row: probe.reliability.get(row, -np.inf))


def _token(probe: Probe, entry: int) -> int:
    assert probe.text is not None
    return int(probe.text.block(int(probe.index["sequence_id"][entry]))[probe.index["position"][entry]])


def _passage(probe: Probe, entries: np.ndarray, chi: np.ndarray, error: np.ndarray, largest: float) -> Passage:
    text, sequence = probe.text, int(probe.index["sequence_id"][entries[0]])
    assert text is not None
    at = {int(probe.index["position"][k]): k for k in entries}

    def piece(position: int, words: str, visible: str, breaks: bool) -> Piece:
        if position not in at:
            return Piece(words, tip="no loss in the probe", breaks=breaks)
        value, spread = float(chi[at[position]]), float(error[at[position]])
        tip = f"{visible} χ {number(value, sign=True)} ± {number(spread, 2)}"
        if abs(value) < CLEAR * spread:
            return Piece(words, tip=tip, breaks=breaks)
        return Piece(words, "up" if value > 0 else "down", max(0.15, abs(value) / largest), tip, breaks)

    title = f"Sequence {sequence}, {text.domain(sequence)}"
    ends = number(-largest), "|χ| below 2 standard errors", number(largest, sign=True)
    return passage(text, sequence, piece, title, ends, "χ")
