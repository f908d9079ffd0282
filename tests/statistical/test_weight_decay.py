"""The LLC at a minimum of loss and weight decay together, in a ridge regression, where it is known.

w* = (H + c)^-1 b minimises L + c/2 |w|^2; with P_i = n_beta (h_i + c) + gamma the LLC of the sum is

    1/2 sum_i n_beta (h_i + c) / P_i  *  1 / (1 - eps P_i / 4)

the last factor being SGLD's at a finite step. Of L alone it has no sign: w* is no minimum of it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from patterning_dist.models.components import select_component
from patterning_dist.response.failure_modes import failure_modes
from patterning_dist.response.llc import llc
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.sample import sample_chains
from patterning_dist.sampling.target import Target

DIMENSION, DECAY, POSTERIOR, STEP_SIZE = 8, 0.3, Posterior(400.0, 1.0), 4e-4
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(64, DIMENSION, generator=GENERATOR)
Y = X @ torch.randn(DIMENSION, generator=GENERATOR) + 0.3 * torch.randn(64, generator=GENERATOR)
HESSIAN = (X.T @ X / len(X)).double()
DATA = TensorDataset(X, Y)


def squared_errors(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    return 0.5 * (model(batch[0])[:, 0] - batch[1]).square()


@pytest.fixture
def ridge() -> nn.Module:
    model = nn.Linear(DIMENSION, 1, bias=False)
    solution = torch.linalg.solve(HESSIAN + DECAY * torch.eye(DIMENSION), (X.T @ Y / len(X)).double())
    model.weight.data = solution.float()[None]
    return model


def test_the_llc_of_loss_and_decay_is_the_closed_form(ridge: nn.Module) -> None:
    def sampled(weight_decay: float, num_draws: int) -> np.ndarray:
        return sample_chains(
            ridge, squared_errors, DATA, DATA, posterior=POSTERIOR, step_size=STEP_SIZE, num_draws=num_draws,
            num_chains=4, burn_in=100, steps_between_draws=4, gradient="full", weight_decay=weight_decay,
        ).losses  # fmt: skip

    stiffness = POSTERIOR.inverse_temperature * (torch.linalg.eigvalsh(HESSIAN).numpy() + DECAY)
    precision = stiffness + POSTERIOR.localization
    exact = 0.5 * (stiffness / precision / (1 - STEP_SIZE * precision / 4)).sum()
    assert 0.5 * (stiffness / precision).sum() == pytest.approx(3.99, abs=0.01)
    losses = sampled(DECAY, 300)
    found = llc(losses, POSTERIOR.inverse_temperature)
    assert abs(found.value - exact) < 4 * found.standard_error
    assert found.standard_error < 0.3
    settings = {"inverse_temperature": POSTERIOR.inverse_temperature, "num_coordinates": DIMENSION}
    assert "below_checkpoint" not in {finding.mode for finding in failure_modes(losses, **settings)}
    (finding,) = (f for f in failure_modes(sampled(0.0, 60), **settings) if f.mode == "below_checkpoint")
    assert finding.message.endswith("minimum of loss and decay together, set sampling.weight_decay")


def test_gradients_and_products_are_of_the_sum(ridge: nn.Module) -> None:
    target = Target(
        ridge, select_component(ridge, "everything"), squared_errors, DATA, DATA, num_component_losses=1,
        weight_decay=DECAY,
    )  # fmt: skip
    everything = np.arange(len(X))
    (name,) = target.center
    at_center = target.gradient(everything)[1][name]
    assert at_center.abs().max() < 1e-6  # w* is the minimum
    with torch.no_grad():
        target.move_to({name: target.center[name] + 0.5})
    _, here, there = target.gradient_here_and_at_center(everything)
    assert torch.equal(there[name], at_center)
    away = (HESSIAN + DECAY * torch.eye(DIMENSION)) @ torch.full((DIMENSION,), 0.5).double()
    torch.testing.assert_close(here[name][0].double(), away, rtol=1e-5, atol=1e-6)
    product = target.hessian_product(target.probe, {name: torch.full((1, DIMENSION), 0.5)})
    torch.testing.assert_close(product[name][0].double(), away, rtol=1e-5, atol=1e-6)
    moved = target.measure()
    target.move_to(target.center)
    center = target.measure()
    rise = 0.5 * 0.5 * away.sum().item()  # exact: the sum is quadratic with its minimum at w*
    assert moved.mean_loss - center.mean_loss == pytest.approx(rise, rel=1e-5)
    assert (moved.observables - center.observables)[0].item() == pytest.approx(rise, rel=1e-5)
