"""Windows walked on losses whose flow is known, in any number of segments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from patterning_dist.config import PredictConfig, TrainingConfig
from patterning_dist.errors import PatterningError
from patterning_dist.models.components import select_component
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.target import Target
from patterning_dist.training import walk as walking
from patterning_dist.training.walk import Window, walk

START, NUM = (0.7, -0.4), 16
RATE, STEPS = 0.05, 30


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(START))


@dataclass
class Known:
    """A loss that is the same for every sample, sum of functions of each coordinate."""

    loss: object
    ranks: Ranks = Ranks()  # noqa: RUF009
    seed: int = 5

    def __post_init__(self):
        def optimizer(model, settings):
            return torch.optim.SGD(model.parameters(), lr=settings.learning_rate)

        def evaluate(model, ranks):
            return {"second": model.w[1].item()}

        data = TensorDataset(torch.zeros(NUM, 1))
        self.task = SimpleNamespace(train=data, optimizer=optimizer, evaluate=evaluate)

    def target(self, name):
        def losses(model, batch):
            return self.loss(model.w).expand(len(batch[0]))

        model = Weights()
        data, held_out = self.task.train, TensorDataset(torch.zeros(2, 1))
        coefficients = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
        everything = select_component(model, "everything")
        return Target(model, everything, losses, data, data, held_out=held_out, coefficients=coefficients)


def walked(loss, segments, rate=RATE, steps=STEPS, clipping=0.0):
    training = TrainingConfig(batch_size=4, optimizer="sgd", learning_rate=rate)
    settings = PredictConfig(gradient_sequences=4, curvature_sequences=4, lanczos_steps=2, segments=segments)
    return walk(Known(loss), "x", Window(training, (1.0,) * steps, clipping, settings))


def test_adamw_is_walked_with_its_state_in_any_number_of_segments():
    """A quadratic without noise: what is left is that second moments are those of where a segment begins."""
    curvatures, slopes, steps = (2.0, -0.5), (0.3, 0.2), 24
    w = torch.nn.Parameter(torch.tensor(START))
    optimizer = torch.optim.AdamW([w], lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        quadratic(curvatures, slopes)(w).backward()
        optimizer.step()
    realised = w.detach().numpy() - START

    class Adam(Known):
        def __post_init__(self):
            super().__post_init__()
            self.task.optimizer = lambda model, settings: torch.optim.AdamW(
                model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
            )
            self.task.evaluate = lambda model, ranks: dict(zip("ab", model.w.tolist(), strict=True))

    training = TrainingConfig(batch_size=4, optimizer="adamw", learning_rate=2e-3, weight_decay=0.1)
    errors = []
    for segments in (2, 8):
        settings = PredictConfig(gradient_sequences=4, curvature_sequences=4, lanczos_steps=2, segments=segments)
        found = walk(Adam(quadratic(curvatures, slopes)), "x", Window(training, (1.0,) * steps, 0.0, settings))
        errors.append(abs((found["metrics"][1] - START) / realised - 1).max())
    # Gradients change by 6 and 8 % in the whole window, and so by 2 % on average in half of one of two segments.
    assert errors[0] < 0.02 and errors[1] < errors[0] / 2.5


def test_groups_of_other_momenta_are_refused():
    class Two(Known):
        def __post_init__(self):
            super().__post_init__()
            self.task.optimizer = lambda model, settings: torch.optim.AdamW(
                [{"params": [model.w]}, {"params": [], "betas": (0.5, 0.98)}], lr=0.1
            )

    settings = PredictConfig(segments=2)
    with pytest.raises(PatterningError, match=r"predict: groups .* have momenta \[0.5, 0.9\], and a window has one"):
        walk(Two(quadratic((1.0, 1.0), (0.0, 0.0))), "x", Window(TrainingConfig(batch_size=4), (1.0,), 0.0, settings))


@pytest.mark.parametrize(("steps", "walks"), [(1, (1, 1)), (3, (1, 3)), (30, (2, 4))])
def test_no_segment_is_without_a_step(steps, walks):
    curvatures, slopes = (2.0, -0.5), (0.3, 0.2)
    found = walked(quadratic(curvatures, slopes), 4, steps=steps)
    assert len(found["growth"]) == sum(walks)
    np.testing.assert_allclose(found["metrics"][:, 0], flow(curvatures, slopes, RATE * steps)[1], rtol=1e-5)


def quadratic(curvatures, slopes):
    a, b = torch.tensor(curvatures), torch.tensor(slopes)
    return lambda w: (0.5 * a * w**2 + b * w).sum()


def flow(curvatures, slopes, tau):
    """w at tau of dw/ds = - (a w + b)."""
    return [
        w * math.exp(-a * tau) - b * (-math.expm1(-a * tau) / a)
        for w, a, b in zip(START, curvatures, slopes, strict=True)
    ]


@pytest.mark.parametrize("segments", [2, 3, 5])
def test_a_quadratic_is_walked_exactly_in_any_number_of_segments(segments):
    curvatures, slopes = (2.0, -0.5), (0.3, 0.2)
    found = walked(quadratic(curvatures, slopes), segments)
    w = flow(curvatures, slopes, RATE * STEPS)
    expected = sum(0.5 * a * x * x + b * x for a, b, x in zip(curvatures, slopes, w, strict=True))
    assert found["parts"].shape == (2, 1, 2, 2) and found["names"] == ["second"]
    np.testing.assert_allclose(found["parts"].sum(axis=(1, 2, 3)), [expected] * 2, rtol=1e-5)
    np.testing.assert_allclose(found["metrics"][:, 0], [w[1]] * 2, rtol=1e-5)
    few = segments // 2
    lengths = [RATE * STEPS / few] * few + [RATE * STEPS / segments] * segments
    np.testing.assert_allclose(found["growth"], [0.5 * length for length in lengths], rtol=1e-4)


def test_segments_close_in_on_the_flow_of_a_loss_that_bends():
    """dw/ds = - w^3 has w = w0 / sqrt(1 + 2 w0^2 s); what halving shows is of the size of the error that is left."""
    rate, steps = 0.1, 20
    exact = START[1] / math.sqrt(1 + 2 * START[1] ** 2 * rate * steps)
    errors = []
    for segments in (2, 4, 8):
        coarse, fine = walked(lambda w: (0.25 * w**4).sum(), segments, rate, steps)["metrics"][:, 0]
        errors.append(abs(fine - exact))
        assert 0.5 * abs(coarse - fine) < abs(coarse - exact) < 2 * abs(coarse - fine)
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2


def test_more_segments_reach_where_one_would_leave():
    """Growth counts for a segment: e^2 in the whole window, in two segments e^1."""
    curvatures, slopes = (1.0, -2.0 / (RATE * STEPS)), (0.0, 0.1)
    left = walked(quadratic(curvatures, slopes), 2)
    assert left["growth"].max() == pytest.approx(2, rel=1e-4) and left["parts"].size == left["metrics"].size == 0
    inside = walked(quadratic(curvatures, slopes), 4)
    assert inside["growth"].max() == pytest.approx(1, rel=1e-4)
    np.testing.assert_allclose(inside["metrics"][:, 0], flow(curvatures, slopes, RATE * STEPS)[1], rtol=1e-5)


def test_gradients_are_clipped_as_in_the_training():
    found = walked(quadratic((0.0, 0.0), (3.0, 4.0)), 2, clipping=2.0)  # of norm 5
    np.testing.assert_allclose(found["metrics"][:, 0], START[1] - RATE * STEPS * 4 * 2 / 5, rtol=1e-5)


def test_draws_spread_as_trainings_of_other_data_orders_do(monkeypatch):
    """Losses 1/2 a (w - c_i)^2, minibatches of 4 of 64 samples; one observable, w itself."""
    a, num, batch, num_draws = 0.8, 64, 4, 40
    centers = torch.linspace(-1, 2, num) ** 3
    monkeypatch.setattr(walking, "NUM_SPREAD", num_draws)

    class Centered(Known):
        def target(self, name):
            def losses(model, columns):
                c, is_held_out = columns
                return torch.where(is_held_out > 0, model.w[0], 0.5 * a * (model.w[0] - c) ** 2)

            model, held_out = Weights(), TensorDataset(torch.zeros(2), torch.ones(2))
            data = self.task.train = TensorDataset(centers, torch.zeros(num))
            everything = select_component(model, "everything")
            coefficients = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
            return Target(model, everything, losses, data, data, held_out=held_out, coefficients=coefficients)

    training = TrainingConfig(batch_size=batch, optimizer="sgd", learning_rate=RATE, weight_decay=0)
    settings = PredictConfig(gradient_sequences=4, curvature_sequences=4, lanczos_steps=2, segments=2)
    subjects = Centered(None)
    subjects.target("x")
    found = walk(subjects, "x", Window(training, (1.0,) * STEPS, 0.0, settings))
    spread = found["spread"]
    assert spread.shape == (num_draws, 1)
    np.testing.assert_allclose(found["metric_spread"], 0, atol=1e-6)  # of the other weight, which no loss is of
    rng, ends = np.random.default_rng(0), []
    for _ in range(400):
        order, w = np.concatenate([rng.permutation(num) for _ in range(2)]), START[0]
        for ids in order[: STEPS * batch].reshape(STEPS, batch):
            w -= RATE * a * (w - centers.numpy()[ids].mean())
        ends.append(w)
    # Variances of 40 draws and of 400 ends: standard errors of 22 % and 7 % of them.
    assert (spread**2).mean() / np.var(ends) == pytest.approx(1, abs=4 * (2 / 40 + 2 / 400) ** 0.5)
    # With replacement it would be more than half as much again.
    x = RATE * a
    assert np.var(ends) < 0.65 * x**2 * centers.var().item() / batch * sum((1 - x) ** (2 * k) for k in range(STEPS))
