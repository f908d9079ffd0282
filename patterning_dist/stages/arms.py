"""What the retrainings came to: metrics and observables of every arm and seed, and differences between arms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from patterning_dist.config import ArmConfig, Config, SplitLossConfig
from patterning_dist.report.reading import column
from patterning_dist.report.record import HEAD_COLUMN
from patterning_dist.report.transitions import first_passing
from patterning_dist.response.contrast import GROUP, OVERALL, crossed_contrast, part_names
from patterning_dist.response.paired import mean_interval
from patterning_dist.storage.files import read_parquet, read_result
from patterning_dist.training.job import HELD_OUT_TABLE

# Columns of a training's table that are no metrics.
_NO_METRICS = ("step", "train_loss", "seconds")


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        settings: of the experiment, start and seeds filled in.
        metrics: at the last step [seed].
        observables: split losses of ``sampling``, and their parts, at the last step [seed].
        influences: of held-out samples on them, and on metrics that are means over these samples [seed, sample].
        groups: documents of these samples [sample].
        transitions: first steps with an induction head, one a seed; None where heads are not scored.
        last_steps: of the trainings, one a seed.
    """

    settings: ArmConfig
    metrics: dict[str, np.ndarray]
    observables: dict[str, np.ndarray]
    influences: dict[str, np.ndarray]
    groups: np.ndarray
    transitions: list[int | None] | None
    last_steps: list[int]

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def seeds(self) -> list[int]:
        return self.settings.seeds or []

    def summary(self) -> dict[str, Any]:
        """Seeds, start and metrics, for summary.json."""
        metrics = {name: entry(values) for name, values in self.metrics.items()}
        return {"seeds": self.seeds, "start": self.settings.start, "metrics": metrics}


def read_arms(config: Config, directory: Path) -> list[Arm]:
    """The arms of a run in their order; none where it does not retrain."""
    if config.retrain is None:
        return []
    return [_read_arm(arm, directory / "retrain" / arm.name) for arm in config.retrain.arm_list]


def _read_arm(settings: ArmConfig, folder: Path) -> Arm:
    folders = [folder / f"seed-{seed}" for seed in settings.seeds or []]
    reports = [read_result(f / "evaluation.json") for f in folders]
    tables = [read_parquet(f / "metrics.parquet", ["step"])[0] for f in folders]
    names = [c for c in tables[0].column_names if c not in _NO_METRICS and not HEAD_COLUMN.fullmatch(c)]
    scored = "prefix_matching" in names
    losses = {name: np.array([r["observables"][name] for r in reports]) for name in reports[0]["observables"]}
    influences = [read_parquet(f / HELD_OUT_TABLE, ())[0] for f in folders]
    return Arm(
        settings,
        {name: np.array([report[name] for report in reports]) for name in names},
        losses,
        {n: np.stack([column(t, n) for t in influences]) for n in influences[0].column_names if n != GROUP},
        column(influences[0], GROUP) if losses else np.zeros(0),
        [first_passing(table) for table in tables] if scored else None,
        [int(column(table, "step")[-1]) for table in tables],
    )


def describe_metrics(config: Config, directory: Path, arms: list[Arm]) -> dict[str, dict[str, str]]:
    """Label, unit and meaning of every metric of the arms, and of every observable that is a loss."""
    found = {}
    if config.training is not None:
        from patterning_dist.tasks.open import open_task  # imports torch, which the metrics of a study do not need

        known = open_task(config, directory, "cpu").metrics
        found = {name: metric._asdict() for name, metric in known.items()}
        bare = [name for arm in arms for name in arm.metrics if name not in known]
        found |= {name: {"label": name.replace("_", " "), "unit": "", "meaning": ""} for name in bare}
    for observable in config.sampling.observables:
        for name in observable.names if observable.kind == "function" else [observable.name]:
            what = {"label": name.replace("_", " "), "unit": "", "meaning": ""}
            if isinstance(observable, SplitLossConfig):
                what |= {"unit": "nats", "meaning": f"split loss {observable.split} of held-out samples"}
                for term in part_names(observable.split):
                    words = f"{what['label']}: {term.replace('_', ' ')}"
                    found[f"{name}:{term}"] = {"label": words, "unit": "nats", "meaning": f"a term of {name}"}
            elif observable.kind == "component_loss":
                what |= {"unit": "nats", "meaning": "mean loss on the probe, as the component moves it"}
            found.setdefault(name, what)
    overall = {"label": "overall loss", "unit": "nats", "meaning": "mean loss on all held-out samples"}
    return found | {OVERALL: found.get(OVERALL, overall)}


def contrasts(arms: list[Arm]) -> tuple[dict[str, Any], list[str]]:
    """Arm -> the plain arm and the control -> differences, and warnings of what is not compared."""
    found: dict[str, Any] = {}
    unpaired = []
    for arm in arms:
        plain = arm.settings.weights is None
        base, control = (None if plain else counterpart(arm, arms, weights) for weights in (None, "permuted"))
        if base is None and not plain:
            start = arm.settings.start
            unpaired.append(f"{arm.name}: no plain arm starts from {start} as well, and so it is not compared; add one")
        for other in (base, control):
            if other is None or arm is other:
                continue
            # Of an observable that is a metric as well, the interval that covers more counts.
            metrics = compare(arm, other, "metrics") | compare(arm, other, "observables")
            if metrics:
                found.setdefault(arm.name, {})[other.name] = metrics
            else:
                unpaired.append(
                    f"{arm.name} and {other.name} have no seed in common and are not compared; give them the same seeds"
                )
    return found, unpaired


def counterpart(arm: Arm, arms: list[Arm], weights: str | None) -> Arm | None:
    """The arm with these weights, of the start and window of ``arm``: the difference is that of the weights alone.

    Of several the one of the nearest strength.
    """
    alike = [one for one in arms if one.settings.weights == weights and same_training(one, arm)]
    return min(alike, key=lambda one: abs(one.settings.strength - arm.settings.strength), default=None)


def same_training(first: Arm, second: Arm) -> bool:
    """Whether two arms start at one checkpoint, or both from initialisation, and are trained alike."""
    return all(getattr(first.settings, key) == getattr(second.settings, key) for key in ("start", "window"))


def shared_seeds(*arms: Arm) -> tuple[list[int], list[list[int]]]:
    """Seeds that all of these arms have, and where each has them."""
    seeds = [seed for seed in arms[0].seeds if all(seed in arm.seeds for arm in arms)]
    return seeds, [[arm.seeds.index(seed) for seed in seeds] for arm in arms]


def compare(arm: Arm, other: Arm, kind: Literal["metrics", "observables"]) -> dict[str, Any]:
    """Differences between two arms, seed by seed; empty where they share none."""
    seeds, (first, second) = shared_seeds(arm, other)
    ours, theirs = getattr(arm, kind), getattr(other, kind)
    changes = {name: ours[name][first] - theirs[name][second] for name in ours if seeds and name in theirs}
    both = arm.influences.keys() & other.influences.keys()
    moved = {name: arm.influences[name][first] - other.influences[name][second] for name in changes if name in both}
    return {
        name: _crossed_entry(values, moved[name], arm.groups) if name in moved else entry(values)
        for name, values in changes.items()
    }


def _crossed_entry(values: np.ndarray, influences: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Mean over seeds, with an interval that covers seeds and held-out samples where both can be estimated."""
    found = crossed_contrast(values, influences, groups)
    errors = {"seeds": found.over_seeds, "sequences": found.over_sequences}
    if found.half_width is None:
        return entry(values) | {"errors": errors}
    ends = [found.value - found.half_width, found.value + found.half_width]
    both = {"interval": ends, "standard_error": found.standard_error, "covers": list(errors)}
    return entry(values) | both | {"errors": errors}


def entry(values: np.ndarray) -> dict[str, Any]:
    """Mean over seeds with its interval [seed]."""
    covers = ["seeds"] if len(values) > 1 else []
    return {"value": values.mean(), "interval": mean_interval(values), "covers": covers, "per_seed": values}
