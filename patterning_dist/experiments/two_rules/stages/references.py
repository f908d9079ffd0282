"""Stages ``prepare`` and ``train``: the strings, networks on plain strings, and the solutions chosen among them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from patterning_dist.errors import PatterningError
from patterning_dist.experiments.two_rules.config import ParenthesesConfig
from patterning_dist.experiments.two_rules.stages.networks import POOL, network_seeds, train_networks, write_networks
from patterning_dist.experiments.two_rules.stages.weighting import PLAIN, write_weights
from patterning_dist.experiments.two_rules.strings import read_split, write_splits
from patterning_dist.progress import Progress
from patterning_dist.storage.files import write_json
from patterning_dist.storage.run import RunDirectory
from patterning_dist.training.stacked import Phase

NESTED, EQUAL_COUNT = "nested", "equal_count"


@dataclass(frozen=True)
class Reference:
    """A network to sample around.

    Attributes:
        rule: that it follows.
        index: in baseline/networks.*.
        rejected: share of out-of-distribution strings.
        is_held_out: no weights are solved from it: what they do is checked there.
    """

    rule: str
    index: int
    rejected: float
    is_held_out: bool = False


def prepare(config: ParenthesesConfig, run: RunDirectory, progress: Progress) -> list[Path]:
    """Draw the strings, and write down the weights that they have in plain training; returns the tables written."""
    progress.start("drawing strings", None)
    tables = write_splits(run.path / "data", config.task, config.seed)
    strings = read_split(run.path / "data", "train", config.task.max_length)
    return [*tables, write_weights(run.path / PLAIN, strings, np.ones(len(strings)))]


def train(config: ParenthesesConfig, run: RunDirectory, progress: Progress) -> list[Path]:
    """Train networks on plain strings and choose the references; returns the files written."""
    strings = read_split(run.path / "data", "train", config.task.max_length)
    seeds = network_seeds(config, POOL, config.references.num_seeds)
    plain = [Phase(config.training.num_steps, strings.class_weights)]
    trained = train_networks(config, run, {"pool": (seeds, plain)}, "baseline", progress)["pool"]
    written = write_networks(run.path / "baseline", seeds, trained)
    references = choose(trained.behaviour, config)
    write_json(run.path / "baseline" / "references.json", [asdict(reference) for reference in references])
    return [*written, run.path / "baseline" / "references.json"]


def choose(behaviour: dict[str, np.ndarray], config: ParenthesesConfig) -> list[Reference]:
    """The networks that follow either rule most clearly, among those that are accurate enough.

    After them check.per_rule held-out ones of either: the next, however clearly they follow it.

    Raises:
        PatterningError: too few are as clear as asked, or accurate.
    """
    wanted, further = config.references, config.check.per_rule
    accurate = np.flatnonzero(behaviour["train"] >= wanted.train_accuracy)
    order = accurate[np.argsort(behaviour["rejected"][accurate], kind="stable")]
    rejected = behaviour["rejected"]
    nested = [i for i in order[::-1] if rejected[i] >= wanted.nested_above][: wanted.per_rule]
    equal_count = [i for i in order if rejected[i] <= wanted.equal_count_below][: wanted.per_rule]
    for rule, found, bound in (
        (NESTED, nested, f"reject at least references.nested_above = {wanted.nested_above:g}"),
        (EQUAL_COUNT, equal_count, f"reject at most references.equal_count_below = {wanted.equal_count_below:g}"),
    ):
        if len(found) < wanted.per_rule:
            raise PatterningError(
                f"references: {len(found)} of {len(rejected)} networks {bound} of the out-of-distribution strings and "
                f"have a training accuracy of at least {wanted.train_accuracy:g}, {wanted.per_rule} {rule} ones are "
                "wanted (references.per_rule); raise references.num_seeds, or change training.weight_decay: more of it "
                "favours EQUAL-COUNT"
            )
    if len(order) < 2 * (wanted.per_rule + further):
        raise PatterningError(
            f"references: {len(order)} of {len(rejected)} networks have a training accuracy of at least "
            f"{wanted.train_accuracy:g}, and {wanted.per_rule} of either rule are wanted with {further} further ones "
            "to check on (check.per_rule); raise references.num_seeds, or lower check.per_rule"
        )
    held_out = slice(wanted.per_rule, wanted.per_rule + further)
    chosen = (
        (NESTED, nested, False),
        (EQUAL_COUNT, equal_count, False),
        (NESTED, order[::-1][held_out].tolist(), True),
        (EQUAL_COUNT, order[held_out].tolist(), True),
    )
    return [
        Reference(rule, int(index), float(rejected[index]), is_held_out)
        for rule, found, is_held_out in chosen
        for index in found
    ]


def read_references(folder: Path) -> list[Reference]:
    """The references of a run, from its folder baseline/."""
    return [Reference(**entry) for entry in json.loads((folder / "references.json").read_text())]
