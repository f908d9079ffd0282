"""Whether the heads that formed carry the behaviour: what is left of it without them, and without others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patterning_dist.report.blocks import Block, Figures, Note, Table
from patterning_dist.report.figures import arm_style, figure, intervals
from patterning_dist.report.reading import ARM_ORDER, in_order
from patterning_dist.report.words import clear, estimate, listed

_KINDS = {"induction_head": "top head", "other_heads": "other heads"}


def ablated_heads(found: Mapping[str, Any]) -> list[Block]:
    """A forest plot and a table of how far the repeated-sequence gap rises; nothing where no heads are known.

    Args:
        found: ``head_ablations`` of summary.json.
    """
    if not found:
        return []
    arms = in_order(found, ARM_ORDER)
    rows = [
        (f"{arm}: {words}", arm_style(arm), "dot" if kind == "induction_head" else "ring", found[arm][kind])
        for arm in arms
        for kind, words in _KINDS.items()
    ]
    plot = intervals(
        rows, "rise of the repeated-sequence gap (nats)", "Rises of the repeated-sequence gap without heads", 24
    )
    carried = [arm for arm in arms if clear(found[arm]["difference"]) > 0]
    head = "the head with the largest prefix-matching score"
    title = f"In no arm does {head} clearly carry more of the gap than others of its layer"
    if carried:
        title = f"{head.capitalize()} carries more of the gap than others of its layer in {listed(carried)}"
    words = (
        "At the end of training the output of a head is set to 0, and the repeated-sequence gap is taken again: filled "
        "points without the head that has the largest prefix-matching score in that network, rings the mean over the "
        "next heads of its layer, which are chosen without looking. Where several heads have formed, the others keep "
        "part of what one carries, and rings may be of formed heads too. 95 % intervals cover seeds."
    )
    cells = [[arm, *(estimate(found[arm][kind], sign=True) for kind in (*_KINDS, "difference"))] for arm in arms]
    table = Table(["arm", "without its top-scoring head", "without another head", "difference"], cells, "Rises in nats")
    return [Figures(figure(title, plot)), table, Note(words, "small")]
