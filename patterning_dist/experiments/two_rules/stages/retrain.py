"""Stage ``retrain``: fresh networks under the weights of every arm, and the posterior measured again under them."""

from __future__ import annotations

from pathlib import Path

from patterning_dist.experiments.two_rules.config import ParenthesesConfig
from patterning_dist.experiments.two_rules.stages.networks import ARMS, network_seeds, train_networks, write_networks
from patterning_dist.experiments.two_rules.stages.references import EQUAL_COUNT, NESTED, read_references
from patterning_dist.experiments.two_rules.stages.sample import sample_subjects, subject
from patterning_dist.experiments.two_rules.stages.weighting import two_phases
from patterning_dist.experiments.two_rules.strings import read_split
from patterning_dist.measure.subject import Subject
from patterning_dist.progress import Progress
from patterning_dist.storage.files import read_parquet, write_json
from patterning_dist.storage.run import RunDirectory
from patterning_dist.training.stacked import Phase

MAIN_ARMS = ("nested", "equal_count", "online_nested", "online_equal_count")
_ONE_PHASE = {"one_phase_nested": "nested", "one_phase_equal_count": "equal_count"}


def retrain(config: ParenthesesConfig, run: RunDirectory, progress: Progress) -> list[Path]:
    """Train the networks of every arm, then sample around references under every strength; returns the files written.

    Arms share seeds, so that they are compared network by network.
    """
    strings = read_split(run.path / "data", "train", config.task.max_length)
    seeds = network_seeds(config, ARMS, config.arms.num_seeds)
    num_steps = config.training.num_steps
    arms = {"base": (seeds, [Phase(num_steps, strings.class_weights)])}
    for arm in weighted_arms(config):
        file = run.path / "weights" / f"{_ONE_PHASE.get(arm, arm)}.parquet"
        weights = read_parquet(file, ("weight",))[0]["weight"].to_numpy()
        phases = [Phase(num_steps, weights)] if arm in _ONE_PHASE else two_phases(config, strings, weights)
        number = config.arms.num_seeds if arm in MAIN_ARMS else config.arms.num_control_seeds
        arms[arm] = (seeds[:number], phases)
    trained = train_networks(config, run, arms, "retrain", progress)
    written = []
    for arm, networks in trained.items():
        written += write_networks(run.path / "retrain" / arm, arms[arm][0], networks)
    checked = checked_subjects(config, run)
    measured = sample_subjects(config, run, "retrain", checked, progress, under_weights=True)
    write_json(run.path / "response" / "realised.json", {"subjects": measured.diagnostics})
    return [*written, *measured.files, run.path / "response" / "realised.json"]


def weighted_arms(config: ParenthesesConfig) -> list[str]:
    """All arms but base, in the order of the report."""
    shuffled = [f"shuffled_{number}" for number in range(config.arms.num_shuffles)]
    others = [f"{kind}_{rule}" for kind in ("free_energy", "llc", "loss") for rule in (NESTED, EQUAL_COUNT)]
    return [*MAIN_ARMS, *_ONE_PHASE, "permuted", *shuffled, *others]


def checked_subjects(config: ParenthesesConfig, run: RunDirectory) -> dict[str, Subject]:
    """The held-out references under the weights of every strength, <rule>-<number>@<strength>.

    Noise and minibatches are those of the chains of stage sample around the same network.
    """
    return {
        f"{reference.rule}-{number}@{strength:+g}": subject(
            config,
            number,
            "baseline",
            reference.index,
            f"weights/{NESTED if strength > 0 else EQUAL_COUNT}.parquet",
            abs(strength),
        )
        for number, reference in enumerate(read_references(run.path / "baseline"))
        if reference.is_held_out
        for strength in config.check.strengths
    }
