"""The window against closed forms: gradient descent and AdamW on quadratics of known curvature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from patterning_dist.sampling.window import (
    Rule,
    Steps,
    metric,
    spread_kernel,
    window_kernel,
    window_move,
    window_spread,
)

D = 12
GENERATOR = torch.Generator().manual_seed(0)


def symmetric(values):
    """A symmetric matrix with these eigenvalues, float64."""
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=GENERATOR, dtype=torch.float64))
    return q @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ q.T


def split(vector):
    return {"a": vector[:5].reshape(5, 1), "b": vector[5:]}


def joined(pieces):
    return torch.cat([piece.flatten() for piece in pieces.values()])


def dot(x, y):
    return float(sum((x[name] * y[name]).sum() for name in x))


def product_of(matrix):
    return lambda v: split(matrix @ joined(v))


CURVATURES = {"convex": np.linspace(0, 3, D), "saddle": np.linspace(-0.3, 4, D), "flat": np.zeros(D)}


@pytest.mark.parametrize("values", CURVATURES.values(), ids=CURVATURES)
@pytest.mark.parametrize("tau", [0.2, 1.0, 4.0])
def test_the_move_is_that_of_the_flow(values, tau):
    hessian, gradient = symmetric(values), torch.randn(D, generator=GENERATOR, dtype=torch.float64)
    rates = torch.rand(D, generator=GENERATOR, dtype=torch.float64) + 0.5
    found = window_move(product_of(hessian), split(gradient), split(rates), dot, tau=tau, num_steps=D)
    # dw/ds = -D (g + H w) as a linear system of one dimension more.
    system = torch.zeros(D + 1, D + 1, dtype=torch.float64)
    system[:D, :D], system[:D, D] = -torch.diag(rates) @ hessian, -rates * gradient
    expected = torch.linalg.matrix_exp(tau * system)[:D, D]
    torch.testing.assert_close(joined(found.vector), expected, rtol=1e-7, atol=1e-9)
    exact = torch.linalg.eigvalsh(torch.diag(rates.sqrt()) @ hessian @ torch.diag(rates.sqrt()))
    assert (found.smallest, found.largest) == pytest.approx((exact[0].item(), exact[-1].item()), abs=1e-8)


def test_few_products_are_enough_and_more_are_better():
    values = np.concatenate([np.linspace(-0.1, 0.5, 190), np.linspace(1, 5, 10)])
    hessian, gradient = symmetric(values), torch.randn(200, generator=GENERATOR, dtype=torch.float64)
    rates = {"w": torch.ones(200, dtype=torch.float64)}

    def moved(num_steps):
        found = window_move(
            lambda v: {"w": hessian @ v["w"]}, {"w": gradient}, rates, dot, tau=4.0, num_steps=num_steps
        )
        return found.vector["w"]

    exact = moved(60)
    errors = [float((moved(m) - exact).norm() / exact.norm()) for m in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01


def test_gradient_descent_goes_where_it_is_predicted():
    """Steps of a small rate follow the flow to first order in the rate."""
    hessian, gradient = symmetric(np.linspace(-0.2, 3, D)), torch.randn(D, generator=GENERATOR, dtype=torch.float64)
    errors = []
    for rate in (0.02, 0.01):
        w, steps = torch.zeros(D, dtype=torch.float64), round(2.0 / rate)
        for _ in range(steps):
            w -= rate * (gradient + hessian @ w)
        rates = split(torch.full((D,), rate, dtype=torch.float64))
        found = joined(window_move(product_of(hessian), split(gradient), rates, dot, tau=steps, num_steps=D).vector)
        errors.append(float((found - w).norm() / w.norm()))
    assert errors[0] < 0.03 and errors[1] / errors[0] == pytest.approx(0.5, abs=0.05)


def test_adamw_with_noisy_gradients_goes_where_it_is_predicted():
    """torch's own AdamW; the noise is of the size that makes its second moment, and averages out over many steps."""
    torch.manual_seed(0)
    scales = torch.logspace(-1, 1, D, dtype=torch.float64)
    hessian = torch.diag(scales.sqrt()) @ symmetric(np.linspace(0.1, 2, D)) @ torch.diag(scales.sqrt())
    gradient, start = 0.2 * scales * torch.sign(torch.randn(D, dtype=torch.float64)), torch.ones(D, dtype=torch.float64)
    steps, rate, decay, repeats = 100, 2e-3, 0.5, 400
    w = torch.nn.Parameter(start.repeat(repeats, 1))
    optimizer = torch.optim.AdamW([w], lr=rate, betas=(0.9, 0.98), weight_decay=decay)
    for _ in range(steps):
        w.grad = gradient + (w.detach() - start) @ hessian + scales * torch.randn(repeats, D, dtype=torch.float64)
        optimizer.step()
    realised = (w.detach() - start).mean(dim=0)
    rates, decays = metric({"w": Rule(rate, decay, 1e-8)}, {"w": gradient**2 + scales**2})

    def product(v):
        return {"w": hessian @ v["w"] + decays["w"] * v["w"]}

    found = window_move(product, {"w": gradient + decays["w"] * start}, rates, dot, tau=steps, num_steps=D).vector["w"]
    assert float((found - realised).norm() / realised.norm()) < 0.15
    blind = window_move(product, {"w": gradient}, rates, dot, tau=steps, num_steps=D).vector["w"]
    assert float((blind - realised).norm() / realised.norm()) > 0.3  # without the decay


def test_the_kernel_is_smooth_at_zero_and_finite_below():
    values = np.array([-2.0, -1e-9, 0.0, 1e-9, 1e-7, 3.0])
    expected = [(math.exp(8) - 1) / 2, 4.0, 4.0, 4.0, 4.0, (1 - math.exp(-12)) / 3]
    np.testing.assert_allclose(window_kernel(values, 4.0), expected, rtol=1e-6)


@pytest.mark.parametrize(("number", "a_pass"), [(30, 1e9), (10, 40), (40, 40), (130, 40)])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_spread_is_that_of_steps_whose_noise_adds_up_to_nothing_in_a_pass(number, a_pass, factor):
    """Against the sum over all pairs of steps."""
    size = min(number, int(a_pass))
    noise = np.kron(np.eye(-(-number // size)), np.eye(size) - np.ones((size, size)) / a_pass)[:number, :number]
    for x in (-0.02, 0.0, 0.01, 0.05, 0.3, 1.0):
        powers = factor * (1 - factor * x) ** np.arange(number)[::-1]
        found = float(spread_kernel(np.array(x), Steps(number, factor, a_pass)))
        assert found == pytest.approx(powers @ noise @ powers, rel=1e-6, abs=1e-6 * (powers @ powers))


def test_a_draw_has_the_covariance_of_the_spread():
    hessian, root = symmetric(np.linspace(-0.01, 0.3, D)), symmetric(np.linspace(0.5, 2, D))
    rates, steps = torch.rand(D, generator=GENERATOR, dtype=torch.float64) + 0.5, Steps(20, 1.0, 50.0)
    draws = [
        joined(window_spread(product_of(hessian), split(column), split(rates), dot, steps, D)) for column in root.T
    ]
    outer = torch.stack(draws).T @ torch.stack(draws)
    scale = torch.diag(rates.sqrt())
    values, vectors = torch.linalg.eigh(scale @ hessian @ scale)
    kernel = scale @ vectors @ torch.diag(torch.from_numpy(spread_kernel(values.numpy(), steps)).sqrt()) @ vectors.T
    expected = kernel @ scale @ root @ root.T @ scale @ kernel.T
    torch.testing.assert_close(outer, expected, rtol=1e-7, atol=1e-9)


def test_no_gradient_moves_nothing():
    nothing, hessian = split(torch.zeros(D, dtype=torch.float64)), symmetric(np.ones(D))
    still = window_move(
        product_of(hessian), nothing, split(torch.ones(D, dtype=torch.float64)), dot, tau=1.0, num_steps=4
    )
    assert not joined(still.vector).any()


def test_the_posterior_of_the_window_moves_as_far_to_within_a_factor():
    """gamma = n_beta / tau: the posterior's kernel is 1 / (x + 1 / tau), F_tau no smaller and at most 1.2985 of it."""
    tau = 3.7
    x = np.concatenate([[0.0], np.geomspace(1e-4, 1e4, 4001)]) / tau
    ratio = window_kernel(x, tau) * (x + 1 / tau)
    assert ratio.min() >= 1 - 1e-9 and ratio.max() == pytest.approx(1.2985, abs=2e-4)
    assert x[ratio.argmax()] * tau == pytest.approx(1.79, abs=0.01)


def test_a_second_moment_of_one_gradient_near_zero_makes_no_rate_without_bound():
    """Of a rare token: one weight's only gradient happened to be near zero. SGD has no second moment."""
    squares = {
        "w": torch.tensor([[1e-10, 4e-10, 1e-15, 3e-10], [0.0, 0.0, 0.0, 0.0]]),
        "b": torch.tensor([1e-4, 1e-12]),
    }
    rules = {"w": Rule(1e-3, 0.1, 1e-8), "b": Rule(1e-3, 0.0, 1e-8)}
    rates, decays = metric(rules, squares)
    mean = 8.00001e-10 / 4
    expected = torch.tensor([1e-10, 4e-10, 1e-2 * mean, 3e-10]).sqrt() + 1e-8
    torch.testing.assert_close(rates["w"][0], 1e-3 / expected)
    torch.testing.assert_close(decays["w"][0], 0.1 * expected)
    torch.testing.assert_close(rates["w"][1], torch.full((4,), 1e5))  # nothing is known of it, and nothing moves it
    torch.testing.assert_close(rates["b"], 1e-3 / (squares["b"].sqrt() + 1e-8))
    rates, _ = metric({"w": Rule(1e-3)}, {"w": squares["w"]})
    assert torch.equal(rates["w"], torch.full((2, 4), 1e-3))
