"""Networks trained in a stack are those trained alone, and their optimiser is AdamW on their own minibatches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from patterning_dist.data.sampler import minibatch, weighted_minibatch
from patterning_dist.sampling.samples import Batch
from patterning_dist.training.stack import stacked_outputs
from patterning_dist.training.stacked import Phase, StackedTraining, StackSettings, schedule

NUM_SAMPLES = 40
SETTINGS = StackSettings(
    num_steps=30, warmup_steps=5, batch_size=16, learning_rate=5e-3, betas=(0.85, 0.97), weight_decay=0.3
)
PLAIN = [Phase(30, np.ones(NUM_SAMPLES))]


class Points:
    """Batches are dicts, as those of a tokenizer."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(NUM_SAMPLES, 3, generator=generator, dtype=torch.float64)
        self.y = torch.randint(4, (NUM_SAMPLES, 2), generator=generator)

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, ids: Any) -> Batch:
        return {"x": self.x[ids], "y": self.y[ids]}


class Toy:
    """A task with two losses a sample, and a model with a buffer."""

    def __init__(self) -> None:
        self.train = Points()

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 8))
        model.register_buffer("temperature", torch.tensor(2.0))
        return model

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["x"]).unflatten(-1, (2, 4)) / model.get_buffer("temperature")
        return functional.cross_entropy(logits.movedim(-1, 1), batch["y"], reduction="none")


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """In double precision, so that the last bits of a batched product are no excuse."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trained(seeds: list[int], phases: list[Phase]) -> dict[str, Tensor]:
    training = StackedTraining(Toy(), SETTINGS, seeds)
    training.run(phases)
    return training.networks()


def test_a_stack_is_its_networks_one_by_one() -> None:
    phases = [Phase(20, np.arange(1.0, NUM_SAMPLES + 1)), *PLAIN]
    stacked, alone = trained([7, 8, 9], phases), trained([8], phases)
    for name, values in stacked.items():
        torch.testing.assert_close(values[1], alone[name][0], rtol=1e-8, atol=1e-10)
        assert not torch.allclose(values[0], values[1])


def test_a_network_is_trained_as_torch_would() -> None:
    """Against a plain module, loop and AdamW; the weights of the samples are those they are drawn with."""
    task, weights = Toy(), np.linspace(0, 2, NUM_SAMPLES)
    found, model = trained([5], [Phase(30, weights)]), task.build(5)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.85, 0.97), weight_decay=0.3)
    for step in range(30):
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS.learning_rate * schedule(step, 5, 30)
        ids = torch.from_numpy(weighted_minibatch(5, 0x737472696E6773, step, 16, np.cumsum(weights)))
        optimizer.zero_grad()
        task.losses(model, task.train[ids]).mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name][0], parameter.detach(), rtol=1e-6, atol=1e-8)


def test_outputs_are_those_of_each_network() -> None:
    task, training = Toy(), StackedTraining(Toy(), SETTINGS, [3, 4])
    found = stacked_outputs(task.losses, training.skeleton, training.parameters, task.train, at_once=7)
    for place, seed in enumerate((3, 4)):
        expected = task.losses(task.build(seed), task.train[torch.arange(NUM_SAMPLES)]).detach().numpy()
        np.testing.assert_allclose(found[place], expected, rtol=1e-12)


def test_weighted_minibatches_follow_the_weights() -> None:
    weights = np.array([0.0, 1.0, 0.0, 3.0, 0.0])
    ids = np.concatenate([weighted_minibatch(0, 1, step, 1000, np.cumsum(weights)) for step in range(20)])
    shares = np.bincount(ids, minlength=5) / len(ids)
    assert not shares[[0, 2, 4]].any()
    assert abs(shares[3] - 0.75) < 5 * np.sqrt(0.75 * 0.25 / len(ids))
    assert (weighted_minibatch(0, 1, 2, 50, np.arange(1, 8)) == minibatch(0, 1, 2, 50, 7)).all()


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    assert [schedule(step, 4, 12) for step in (0, 3, 4, 8, 12)] == pytest.approx([0.25, 1, 1, 0.5, 0])
