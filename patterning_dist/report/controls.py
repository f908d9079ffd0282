"""What the weights of every control are made of, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patterning_dist.report.blocks import Table
from patterning_dist.report.reading import ARM_ORDER, in_order
from patterning_dist.report.words import number

# Of the keys of an entry of solve.controls, and of the subject that section solve names.
_WORDS = {
    "ablation": "how far each loss rises where {subject} is set to 0",
    "gradient": "alignment of each loss's gradient over {subject} with that of the held-out loss {split}, at the "
    "checkpoint, without draws: it is told the split, and weighs up what lowers it",
    "influence": "influence on the held-out loss {split}: alignment of each loss's gradient over {subject} with the "
    "damped inverse Hessian of that of the split, at the checkpoint, without draws: it is told the split",
    "loss_contrast": "how much larger each loss is at {checkpoint} than at the checkpoint that is sampled",
    "minimum_norm": "scores of plus without bounds; labels are swapped where weights would be below 0",
    "permuted": "the weights of plus, dealt to other losses of the same {within}",
    "scores": "scores of {path}, which were made elsewhere",
    "split": "the losses that the split {split} names, without any posterior: an oracle",
}
_DRAWS = {"antithetic": "Gaussian draws around the checkpoint, without chains", "chains": "draws of the chains"}


def controls_table(solution: Mapping[str, Any]) -> Table | None:
    """A row for every control; None where there are none."""
    solved = solution.get("arms") or {}
    arms = [arm for arm in in_order(solved, ARM_ORDER) if solved[arm].get("control")]
    rows = [[arm, _words(solved[arm], solution.get("subject", "the component"))] for arm in arms]
    title = "What the controls are made of, within the bounds and at the effective share of plus"
    return Table(["arm", "weight follows"], rows, title) if rows else None


def _words(entry: Mapping[str, Any], subject: str) -> str:
    control = entry["control"]
    if control["kind"] != "first_moment":
        words = _WORDS[control["kind"]].format(**control, subject=subject)
        if solve := entry.get("conjugate_gradients"):
            words += f" ({solve['num_iterations']} products, residual {number(solve['relative_residual'], 2)}"
            words += ", stopped at negative curvature)" if solve["negative_curvature"] else ")"
        return words
    replicates, reliability = entry["replicates"], entry.get("reliability")
    words = f"first moments of {subject} as for plus, from {_DRAWS[control['draws']]}; scores from "
    words += f"{replicates['number']} {replicates['of']} repeat from half to half of them with "
    return words + (f"r = {number(reliability, decimals=2)}" if reliability is not None else "an r that is not known")
