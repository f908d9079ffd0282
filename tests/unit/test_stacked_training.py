"""Networks trained in a stack are those trained alone, and their optimiser is AdamW on their own minibatches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from patterning_dist.data.sampler import minibatch, weighted_minibatch
from patterning_dist.experiments.two_rules.behaviour import behaviour
from patterning_dist.experiments.two_rules.classifier import BracketClassifier, build_classifier, string_losses
from patterning_dist.experiments.two_rules.config import ClassifierConfig, ClassifierTrainingConfig, TaskConfig
from patterning_dist.experiments.two_rules.strings import SPLITS, BracketStrings, read_split, write_splits
from patterning_dist.training.stacked import Phase, StackedTraining, schedule, stacked_logits

MODEL = ClassifierConfig(num_layers=2, num_heads=2, width=8, feedforward=12)
TRAINING = ClassifierTrainingConfig(
    num_steps=30,
    warmup_steps=5,
    batch_size=16,
    learning_rate=5e-3,
    betas=(0.85, 0.97),
    weight_decay=0.3,
    seeds_per_task=4,
)
TASK = TaskConfig(
    min_length=4,
    length_trials=3,
    num_balanced=20,
    num_unequal=60,
    unequal="stratified",
    num_test=8,
    num_out_of_distribution=10,
)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BracketStrings]:
    folder = tmp_path_factory.mktemp("task")
    write_splits(folder, TASK, seed=0)
    return {name: read_split(folder, name, TASK.max_length) for name in SPLITS}


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """In double precision, so that the last bits of a batched product are no excuse."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trained(strings: BracketStrings, seeds: list[int], phases: list[Phase]) -> dict[str, torch.Tensor]:
    training = StackedTraining(MODEL, TRAINING, strings, seeds)
    training.run(phases)
    return training.networks()


def test_a_stack_is_its_networks_one_by_one(splits: dict[str, BracketStrings]) -> None:
    strings = splits["train"]
    phases = [Phase(20, np.arange(1.0, len(strings) + 1)), Phase(30, strings.class_weights)]
    stacked = trained(strings, [7, 8, 9], phases)
    alone = trained(strings, [8], phases)
    for name, values in stacked.items():
        torch.testing.assert_close(values[1], alone[name][0], rtol=1e-8, atol=1e-10)
        assert not torch.allclose(values[0], values[1]) or "norm" in name


def test_a_network_is_trained_as_torch_would(splits: dict[str, BracketStrings]) -> None:
    """Against a plain module, loop and AdamW; the weights of the strings are those they are drawn with."""
    strings = splits["train"]
    weights = np.linspace(0, 2, len(strings))
    found = trained(strings, [5], [Phase(30, weights)])
    model = build_classifier(MODEL, TASK.max_length, 5)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.85, 0.97), weight_decay=0.3)
    for step in range(30):
        for group in optimizer.param_groups:
            group["lr"] = TRAINING.learning_rate * schedule(step, 5, 30)
        ids = torch.from_numpy(weighted_minibatch(5, 0x737472696E6773, step, 16, np.cumsum(weights)))
        tokens, lengths, labels = strings[ids]
        optimizer.zero_grad()
        string_losses(model, tokens, lengths, labels.double()).mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name][0], parameter.detach(), rtol=1e-6, atol=1e-8)


def test_nothing_behind_the_end_is_seen(splits: dict[str, BracketStrings]) -> None:
    model = build_classifier(MODEL, TASK.max_length, 1)
    tokens, lengths, _ = splits["train"][torch.arange(len(splits["train"]))]
    assert (lengths < TASK.max_length).any()
    positions = torch.arange(tokens.shape[1])
    other = torch.where(positions > lengths[:, None], (tokens + 1) % 3, tokens)
    torch.testing.assert_close(model(tokens, lengths), model(other, lengths))
    assert not torch.equal(tokens, other)


def test_weighted_minibatches_follow_the_weights() -> None:
    weights = np.array([0.0, 1.0, 0.0, 3.0, 0.0])
    ids = np.concatenate([weighted_minibatch(0, 1, step, 1000, np.cumsum(weights)) for step in range(20)])
    shares = np.bincount(ids, minlength=5) / len(ids)
    assert not shares[[0, 2, 4]].any()
    assert abs(shares[3] - 0.75) < 5 * np.sqrt(0.75 * 0.25 / len(ids))
    assert (weighted_minibatch(0, 1, 2, 50, np.arange(1, 8)) == minibatch(0, 1, 2, 50, 7)).all()


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    assert [schedule(step, 4, 12) for step in (0, 3, 4, 8, 12)] == pytest.approx([0.25, 1, 1, 0.5, 0])


def test_behaviour_counts_by_first_symbol(splits: dict[str, BracketStrings]) -> None:
    networks = {
        name: torch.stack([p.detach() for p in column])
        for name, column in (
            (name, [dict(build_classifier(MODEL, TASK.max_length, seed).named_parameters())[name] for seed in (0, 1)])
            for name, _ in BracketClassifier(MODEL, TASK.max_length).named_parameters()
        )
    }
    skeleton = BracketClassifier(MODEL, TASK.max_length).to("meta")
    found = behaviour(skeleton, networks, splits)
    unnested = splits["out_of_distribution"]
    rejected = stacked_logits(skeleton, networks, unnested) <= 0
    opens = np.array([text[0] == "(" for text in unnested.text])
    assert found.rejected == pytest.approx(rejected.mean(axis=1))
    mixed = opens.mean() * found.rejected_open + (1 - opens.mean()) * found.rejected_close
    assert found.rejected == pytest.approx(mixed)
    assert found.train.shape == found.test.shape == (2,)
