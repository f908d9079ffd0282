"""One SGLD step: pure, and an affine map whose stationary covariance is known exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov

from patterning_dist.sampling import sgld
from patterning_dist.sampling.posterior import Posterior

CENTER = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
HESSIAN = torch.tensor([[2.0, 0.7, -0.3], [0.7, 1.5, 0.4], [-0.3, 0.4, 0.8]], dtype=torch.float64)
OPTIMUM = torch.tensor([0.2, 0.1, -0.6], dtype=torch.float64)
POSTERIOR = Posterior(inverse_temperature=17.0, localization=3.5)


def advance(w, noise, step_size):
    state = sgld.State({"w": w}, 4)
    gradient = {"w": HESSIAN @ (w - OPTIMUM)}
    settings = {"center": {"w": CENTER}, "posterior": POSTERIOR, "step_size": step_size}
    return sgld.step(state, gradient, {"w": noise}, **settings)


def affine_map(step_size):
    """(A, b, c) of w -> A w + b + c noise, read off the step itself."""
    zero = torch.zeros(3, dtype=torch.float64)
    b = advance(zero, zero, step_size).position["w"]
    columns = [advance(e, zero, step_size).position["w"] - b for e in torch.eye(3, dtype=torch.float64)]
    c = torch.stack([advance(zero, e, step_size).position["w"] - b for e in torch.eye(3, dtype=torch.float64)])
    return torch.stack(columns, dim=1).numpy(), b.numpy(), c.numpy()


def precision():
    return (POSTERIOR.inverse_temperature * HESSIAN + POSTERIOR.localization * torch.eye(3)).numpy()


def stationary_covariance(step_size):
    a, _, c = affine_map(step_size)
    return solve_discrete_lyapunov(a, c @ c.T)


def test_one_step_by_hand():
    w = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    noise = torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64)
    drift = 17.0 * (HESSIAN @ (w - OPTIMUM)) + 3.5 * (w - CENTER)
    wanted = w - 0.02 / 2 * drift + 0.02**0.5 * noise
    after = advance(w, noise, 0.02)
    torch.testing.assert_close(after.position["w"], wanted, rtol=1e-14, atol=1e-14)
    assert after.step == 5


def test_step_leaves_its_inputs_alone():
    inputs = {key: {"w": torch.randn(3), "v": torch.randn(2, 2)} for key in ("state", "gradient", "noise", "center")}
    before = {key: {n: t.clone() for n, t in value.items()} for key, value in inputs.items()}
    state = sgld.State(inputs["state"], 7)
    after = sgld.step(
        state, inputs["gradient"], inputs["noise"], center=inputs["center"], posterior=POSTERIOR, step_size=0.3
    )
    for key, value in before.items():
        for name, tensor in value.items():
            assert torch.equal(inputs[key][name], tensor), (key, name)
    assert state.step == 7
    assert not torch.equal(after.position["w"], before["state"]["w"])


def test_init_copies_the_center():
    center = {"w": torch.ones(2)}
    state = sgld.init(center)
    center["w"].zero_()
    assert state.step == 0
    assert state.position["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("step_size", [1e-3, 0.01, 0.03])
def test_the_fixed_point_is_the_posterior_mean_and_the_law_is_that_of_the_recursion(step_size):
    a, b, c = affine_map(step_size)
    np.testing.assert_allclose(a, np.eye(3) - step_size / 2 * precision(), atol=1e-13)
    np.testing.assert_allclose(c, np.sqrt(step_size) * np.eye(3), atol=1e-13)
    mean = np.linalg.solve(precision(), (17.0 * HESSIAN @ OPTIMUM + 3.5 * CENTER).numpy())
    np.testing.assert_allclose(np.linalg.solve(np.eye(3) - a, b), mean, rtol=1e-10)
    exact = np.linalg.inv(precision() - step_size / 4 * precision() @ precision())
    np.testing.assert_allclose(stationary_covariance(step_size), exact, rtol=1e-9, atol=1e-12)


def test_the_bias_of_the_covariance_halves_with_the_step():
    target = np.linalg.inv(precision())
    bias = [np.linalg.norm(stationary_covariance(0.004 / 2**k) - target) for k in range(5)]
    ratios = np.array(bias[:-1]) / np.array(bias[1:])
    assert 1.9 < ratios[0] < 2.3
    assert np.all(np.diff(np.abs(ratios - 2)) < 0)  # of first order exactly: the ratio tends to two
    assert ratios[-1] == pytest.approx(2.0, abs=0.01)
