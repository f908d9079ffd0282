"""The bracket classifier as a task: what it sees, what is said of it, and its networks as checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from patterning_dist.config import load_config
from patterning_dist.experiments.two_rules.behaviour import behaviour, stacked_logits
from patterning_dist.experiments.two_rules.stages.weighting import write_weights
from patterning_dist.experiments.two_rules.strings import write_splits
from patterning_dist.experiments.two_rules.task import BracketTask
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.training.stack import Networks

SEEDS = (3, 4)
CONFIG = load_config(
    Path(__file__).parents[2] / "configs" / "parentheses-small.yaml",
    [
        "task={min_length: 4, length_trials: 3, num_balanced: 20, num_unequal: 60, unequal: stratified, num_test: 8, "
        "num_out_of_distribution: 10}",
        "model={num_layers: 2, num_heads: 2, width: 8, feedforward: 12}",
    ],
)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> BracketTask:
    folder = tmp_path_factory.mktemp("task")
    write_splits(folder / "data", CONFIG.task, seed=0)
    return BracketTask(CONFIG, folder, "cpu")


@pytest.fixture(scope="module")
def networks(task: BracketTask) -> Networks:
    models = [dict(task.build(seed).named_parameters()) for seed in SEEDS]
    return {name: torch.stack([model[name].detach() for model in models]) for name in models[0]}


def test_nothing_behind_the_end_is_seen(task: BracketTask) -> None:
    tokens, lengths, _ = task.train[torch.arange(len(task.train))]
    assert (lengths < CONFIG.task.max_length).any()
    positions, model = torch.arange(tokens.shape[1]), task.build(1)
    other = torch.where(positions > lengths[:, None], (tokens + 1) % 3, tokens)
    torch.testing.assert_close(model(tokens, lengths), model(other, lengths))
    assert not torch.equal(tokens, other)


def test_behaviour_counts_by_first_symbol(task: BracketTask, networks: Networks) -> None:
    found = behaviour(task, task.skeleton(), networks)
    assert list(found) == list(task.metrics)
    unnested = task.held_out["out_of_distribution"]
    rejected = stacked_logits(task.skeleton(), networks, unnested) <= 0
    opens = np.array([text[0] == "(" for text in unnested.text])
    assert found["rejected"] == pytest.approx(rejected.mean(axis=1))
    mixed = opens.mean() * found["rejected_open"] + (1 - opens.mean()) * found["rejected_close"]
    assert found["rejected"] == pytest.approx(mixed)
    for place, seed in enumerate(SEEDS):
        alone = task.evaluate(task.build(seed), Ranks())
        assert alone == pytest.approx({name: column[place] for name, column in found.items()})


def test_a_network_of_a_stack_is_a_checkpoint(task: BracketTask, networks: Networks) -> None:
    (task.directory / "baseline").mkdir()
    save_file(networks, task.directory / "baseline" / "networks.safetensors")
    loaded = task.load("baseline:1", Ranks())
    expected = task.build(SEEDS[1]).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert task.fingerprint("baseline:0") != task.fingerprint("baseline:1")


def test_weights_are_read_at_any_strength(task: BracketTask, tmp_path: Path) -> None:
    relative = np.linspace(0.5, 1.5, len(task.train))
    path = write_weights(tmp_path / "weights.parquet", task.train, relative)
    for strength in (-1.0, 0.5, 1.0):
        expected = task.train.class_weights * (1 + strength * (relative - 1))
        np.testing.assert_allclose(task.read_weights(path, strength), expected, rtol=1e-12)
