"""LDS and QLD of every method: what its scores predict of retrainings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patterning_dist.report.blocks import Figures, Note, Section, Table
from patterning_dist.report.figures import figure, intervals
from patterning_dist.report.reading import Run
from patterning_dist.report.words import clear, estimate, listed, number

_RANDOM = "random"


def validation(section: Section, run: Run) -> None:
    """One row a method, by LDS; random scores last."""
    found = run.json("validate/summary.json")
    if found is None:
        section.missing = "Stage validate has not been run."
        return
    methods: dict[str, Any] = found["methods"]
    order = sorted(methods, key=lambda name: (name == _RANDOM, -methods[name]["lds"]["value"]))
    lines = [(name, "plus" if name != _RANDOM else "permuted", "ring", methods[name]["lds"]) for name in order]
    svg = intervals(lines, "LDS", "LDS of every method", row_height=22)
    section.blocks += [Figures(list(figure(_title(methods, order), svg))), Note(_words(found), "small")]
    kinds = [(key, label) for key, label in (("qld", "QLD"), ("token_qld", "per-token QLD")) if key in methods[_RANDOM]]
    headers = ["method", "LDS", "LDS over subsets alone", *(f"{label} [nats]" for _, label in kinds)]
    rows = []
    for name in order:
        lds = methods[name]["lds"]
        of_subsets = {"value": lds["value"], "interval": lds.get("interval_over_subsets")}
        differences = [estimate(methods[name].get(key), sign=True) for key, _ in kinds]
        rows.append([name.replace("_", " "), estimate(lds, sign=True), estimate(of_subsets, sign=True), *differences])
    section.blocks.append(Table(headers, rows, "Attribution scores, with 95 % bootstrap intervals"))


def _title(methods: Mapping[str, Any], order: list[str]) -> str:
    known = [name.replace("_", " ") for name in order if name != _RANDOM and clear(methods[name]["lds"]) > 0]
    if clear(methods[_RANDOM]["lds"]):
        return "Random scores differ from 0: the bank is not to be trusted"
    return f"{listed(known)} predict{'s' if len(known) == 1 else ''} retrainings" if known else "Nothing is predicted"


def _words(found: Mapping[str, Any]) -> str:
    low, high = found["num_removed"]
    removed = number(low) if low == high else f"{number(low)} to {number(high)}"
    words = (
        f"LDS: Spearman's correlation over {found['num_subsets']} subsets, each without {removed} of "
        f"{number(found['num_samples'])} training samples, between the sum of scores of the samples left out and the "
        f"change of a held-out sample's loss after retraining from {found['start']}; mean over {found['num_queries']} "
        "held-out samples. Intervals are over subsets and held-out samples."
    )
    if found.get("passes") is not None:
        words += f" A retraining sees every sample {number(found['passes'])} times on average."
    if found["ceiling"] is not None:
        agreement = estimate(found["agreement"], sign=True)
        words += f" Halves of the seeds agree by {agreement}: perfect scores would come to {number(found['ceiling'])}."
    for key, what in (("removed_share", "samples"), ("removed_token_share", "losses")):
        if found[key] is not None:
            words += f" QLD removes {number(100 * found[key])} % of the {what}, those that help a held-out sample most."
    return words
