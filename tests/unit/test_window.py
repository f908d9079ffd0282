"""The window against closed forms and steps taken one by one: gradient descent and AdamW on quadratics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from patterning_dist.sampling.steps import Steps, responses, spread_kernel
from patterning_dist.sampling.window import Rule, metric, second_moments, window_move, window_spread

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


def positive():
    return torch.rand(D, generator=GENERATOR, dtype=torch.float64) + 0.5


STILL = split(torch.zeros(D, dtype=torch.float64))
CURVATURES = {"convex": np.linspace(0, 3, D), "saddle": np.linspace(-0.3, 4, D), "flat": np.zeros(D)}


@pytest.mark.parametrize("values", CURVATURES.values(), ids=CURVATURES)
@pytest.mark.parametrize("tau", [0.2, 1.0, 4.0])
def test_without_momentum_the_move_is_that_of_the_flow(values, tau):
    hessian, gradient, rates = symmetric(values), torch.randn(D, generator=GENERATOR, dtype=torch.float64), positive()
    steps = Steps(tau * np.array([0.1, 0.5, 0.0, 0.4]))
    found = window_move(product_of(hessian), split(gradient), STILL, split(rates), dot, steps, D)
    # dw/ds = -D (g + H w) as a linear system of one dimension more.
    system = torch.zeros(D + 1, D + 1, dtype=torch.float64)
    system[:D, :D], system[:D, D] = -torch.diag(rates) @ hessian, -rates * gradient
    expected = torch.linalg.matrix_exp(tau * system)[:D, D]
    torch.testing.assert_close(joined(found.vector), expected, rtol=1e-7, atol=1e-9)
    exact = torch.linalg.eigvalsh(torch.diag(rates.sqrt()) @ hessian @ torch.diag(rates.sqrt()))
    assert (found.smallest, found.largest) == pytest.approx((exact[0].item(), exact[-1].item()), abs=1e-8)


def followed(hessian, gradient, rates, factors, momentum):
    """w_T and m_T of steps that are each followed for their length, m_t and w as one linear system."""
    w, m = torch.zeros(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    for number, factor in enumerate(factors, 1):
        size = factor / (1 - momentum**number) * rates
        system = torch.zeros(D + 1, D + 1, dtype=torch.float64)
        system[:D, :D] = -torch.diag(size * (1 - momentum)) @ hessian
        system[:D, D] = -size * (momentum * m + (1 - momentum) * gradient)
        m = momentum * m + (1 - momentum) * (gradient + hessian @ w)
        w = torch.linalg.matrix_exp(system) @ torch.cat([w, torch.ones(1, dtype=torch.float64)])
        w = w[:D]
    return w, m


@pytest.mark.parametrize("values", CURVATURES.values(), ids=CURVATURES)
@pytest.mark.parametrize("parts", [(13,), (5, 8), (1, 2, 10)])
def test_momentum_is_followed_step_by_step_and_carried_from_part_to_part(values, parts):
    hessian, gradient, rates = symmetric(values), torch.randn(D, generator=GENERATOR, dtype=torch.float64), positive()
    factors, momentum = np.linspace(0.05, 0.3, sum(parts)), 0.8
    w, m, before = torch.zeros(D, dtype=torch.float64), STILL, 0
    for part in parts:
        here, steps = gradient + hessian @ w, Steps(factors[before : before + part], before, momentum)
        found = window_move(product_of(hessian), split(here), m, split(rates), dot, steps, D)
        w, m, before = w + joined(found.vector), found.momentum, before + part
    expected = followed(hessian, gradient, rates, factors, momentum)
    torch.testing.assert_close(w, expected[0], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(joined(m), expected[1], rtol=1e-7, atol=1e-9)


def test_momentum_alone_goes_on_without_a_gradient():
    momentum, rates, steps = split(torch.randn(D, generator=GENERATOR, dtype=torch.float64)), positive(), 6
    number = Steps(np.ones(steps), 3, 0.9)
    found = window_move(product_of(symmetric(np.ones(D))), STILL, momentum, split(rates), dot, number, 4)
    share = sum(0.9**k / (1 - 0.9 ** (3 + k)) for k in range(1, steps + 1))
    torch.testing.assert_close(joined(found.vector), -share * rates * joined(momentum))
    torch.testing.assert_close(joined(found.momentum), 0.9**steps * joined(momentum))


def test_few_products_are_enough_and_more_are_better():
    values = np.concatenate([np.linspace(-0.1, 0.5, 190), np.linspace(1, 5, 10)])
    hessian, gradient = symmetric(values), torch.randn(200, generator=GENERATOR, dtype=torch.float64)
    rates, still = {"w": torch.ones(200, dtype=torch.float64)}, {"w": torch.zeros(200, dtype=torch.float64)}

    def moved(num_products, momentum):
        steps = Steps(np.full(40, 0.1), 0, momentum)
        return window_move(
            lambda v: {"w": hessian @ v["w"]}, {"w": gradient}, still, rates, dot, steps, num_products
        ).vector["w"]

    for momentum in (0.0, 0.9):
        exact = moved(60, momentum)
        errors = [float((moved(m, momentum) - exact).norm() / exact.norm()) for m in (2, 4, 6, 8)]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_descent_goes_where_it_is_predicted(momentum):
    """To first order in the rate, and so does the flow without momentum, which is far less near to its steps."""
    hessian, gradient = symmetric(np.linspace(-0.2, 3, D)), torch.randn(D, generator=GENERATOR, dtype=torch.float64)
    errors: dict[float, list[float]] = {}
    for rate in (0.02, 0.01):
        w, m, number = torch.zeros(D, dtype=torch.float64), 0.0, round(2.0 / rate)
        for t in range(1, number + 1):
            m = momentum * m + (1 - momentum) * (gradient + hessian @ w)
            w = w - rate * m / (1 - momentum**t)
        rates, factors = split(torch.full((D,), rate, dtype=torch.float64)), np.ones(number)
        for b in {0.0, momentum}:
            found = window_move(product_of(hessian), split(gradient), STILL, rates, dot, Steps(factors, 0, b), D)
            errors.setdefault(b, []).append(float((joined(found.vector) - w).norm() / w.norm()))
    for first, second in errors.values():
        assert first < 0.06 and second / first == pytest.approx(0.5, abs=0.05)
    assert momentum == 0 or errors[momentum][0] < errors[0.0][0] / 10


@pytest.mark.parametrize("steps", [20, 100])
def test_adamw_with_noisy_gradients_goes_where_it_is_predicted(steps):
    """torch's own AdamW; the noise is of the size that makes its second moment, and averages out over repeats.

    That second moments are means of t gradients takes (1 - r)(1 - 3 r) / 4 sum_t 1 / t of T, with a share r of .04: 4 %
    of 20 steps. Noise leaves 2 % of the move after 2000 repeats.
    """
    torch.manual_seed(0)
    scales = torch.logspace(-1, 1, D, dtype=torch.float64)
    hessian = torch.diag(scales.sqrt()) @ symmetric(np.linspace(0.1, 2, D)) @ torch.diag(scales.sqrt())
    gradient, start = 0.2 * scales * torch.sign(torch.randn(D, dtype=torch.float64)), torch.ones(D, dtype=torch.float64)
    rate, decay, repeats = 0.2 / steps, 0.5, 2000
    w = torch.nn.Parameter(start.repeat(repeats, 1))
    optimizer = torch.optim.AdamW([w], lr=rate, betas=(0.9, 0.98), weight_decay=decay)
    for _ in range(steps):
        w.grad = gradient + (w.detach() - start) @ hessian + scales * torch.randn(repeats, D, dtype=torch.float64)
        optimizer.step()
    realised = (w.detach() - start).mean(dim=0)
    rates, decays = metric({"w": Rule(rate, decay, 1e-8)}, {"w": gradient**2 + scales**2})

    def error(pull, momentum):
        def product(v):
            return {"w": hessian @ v["w"] + decays["w"] * v["w"]}

        still, training = {"w": torch.zeros(D, dtype=torch.float64)}, Steps(np.ones(steps), 0, momentum)
        found = window_move(product, {"w": gradient + pull}, still, rates, dot, training, D).vector["w"]
        return float((found - realised).norm() / realised.norm())

    assert error(decays["w"] * start, 0.9) < 0.05
    assert error(decays["w"] * start, 0.0) > 2 * error(decays["w"] * start, 0.9)
    assert error(0.0, 0.9) > 0.3  # without the decay


def test_the_kernel_is_smooth_at_zero_and_finite_below():
    values = np.array([-2.0, -1e-9, 0.0, 1e-9, 1e-7, 3.0])
    expected = [(math.exp(8) - 1) / 2, 4.0, 4.0, 4.0, 4.0, (1 - math.exp(-12)) / 3]
    np.testing.assert_allclose(-responses(values, Steps(np.full(8, 0.5)))[0].sum(axis=0), expected, rtol=1e-6)


def test_gradients_of_the_first_steps_count_for_most():
    """Where there is no curvature all steps come to T, and the share of each is what bias correction makes of it."""
    found, _ = responses(np.zeros(1), Steps(np.ones(20), 0, 0.9))
    shares = [sum(0.1 * 0.9 ** (t - s) / (1 - 0.9**t) for t in range(s, 21)) for s in range(1, 21)]
    np.testing.assert_allclose(-found[:, 0], shares, rtol=1e-12)
    assert sum(shares) == pytest.approx(20) and shares[0] > 2.8 and shares[-1] < 0.12


def test_second_moments_are_those_of_adamw():
    """Segments of other E g^2, rates that warm up; and nothing is remembered without a memory."""
    parts, memory, q = [(0, 4), (4, 6), (6, 13)], 0.9, [2.0, 0.5, 7.0]
    factors = np.linspace(0.1, 1.3, 13)
    for rule in (Rule(1e-3, 0.0, 1e-8, memory), Rule(1e-3)):
        before, running, t = {"w": torch.zeros(3)}, 0.0, 0
        for (start, stop), square in zip(parts, q, strict=True):
            squares = {"w": torch.full((3,), square)}
            mean, before = second_moments({"w": rule}, squares, before, Steps(factors[start:stop], start, 0.5))
            corrected = []
            for _ in range(start, stop):
                t, running = t + 1, rule.memory * running + (1 - rule.memory) * square
                corrected.append(running / (1 - rule.memory**t))
            torch.testing.assert_close(mean["w"], torch.full((3,), np.average(corrected, weights=factors[start:stop])))
            torch.testing.assert_close(before["w"], torch.full((3,), running))


@pytest.mark.parametrize(("number", "a_pass"), [(30, 1e9), (10, 40), (40, 40), (130, 40)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_spread_is_that_of_steps_whose_noise_adds_up_to_nothing_in_a_pass(number, a_pass, momentum):
    """Against steps taken with a unit of gradient in one of them, and the sum over all pairs."""
    size, factors = min(number, int(a_pass)), np.linspace(0.4, 1.0, number)
    noise = np.kron(np.eye(-(-number // size)), np.eye(size) - np.ones((size, size)) / a_pass)[:number, :number]
    for x in (-0.02, 0.0, 0.01, 0.05, 0.3, 1.0):
        w, m, g = np.zeros(number), np.zeros(number), np.eye(number)
        for t, factor in enumerate(factors, 1):
            size = factor / (1 - momentum**t)
            z = (1 - momentum) * size * x
            m = momentum * m + (1 - momentum) * (g[t - 1] + x * w)
            w = w - size * m * (-math.expm1(-z) / z if z else 1.0)
        found = float(spread_kernel(np.array([x]), Steps(factors, 0, momentum), a_pass)[0])
        assert found == pytest.approx(w @ noise @ w, rel=1e-6, abs=1e-6 * (w @ w))


def test_a_draw_has_the_covariance_of_the_spread():
    hessian, root = symmetric(np.linspace(-0.01, 0.3, D)), symmetric(np.linspace(0.5, 2, D))
    rates, steps = positive(), Steps(np.ones(20), 0, 0.9)
    draws = [
        joined(window_spread(product_of(hessian), split(column), split(rates), dot, steps, 50.0, D))
        for column in root.T
    ]
    outer = torch.stack(draws).T @ torch.stack(draws)
    scale = torch.diag(rates.sqrt())
    values, vectors = torch.linalg.eigh(scale @ hessian @ scale)
    kernel = (
        scale @ vectors @ torch.diag(torch.from_numpy(spread_kernel(values.numpy(), steps, 50.0)).sqrt()) @ vectors.T
    )
    expected = kernel @ scale @ root @ root.T @ scale @ kernel.T
    torch.testing.assert_close(outer, expected, rtol=1e-7, atol=1e-9)


def test_no_gradient_moves_nothing():
    hessian, rates, steps = symmetric(np.ones(D)), split(torch.ones(D, dtype=torch.float64)), Steps(np.ones(3), 0, 0.9)
    still = window_move(product_of(hessian), STILL, STILL, rates, dot, steps, 4)
    assert not joined(still.vector).any() and not joined(still.momentum).any()
    assert not joined(window_spread(product_of(hessian), STILL, rates, dot, steps, 50.0, 4)).any()


def test_the_posterior_of_the_window_moves_as_far_to_within_a_factor():
    """gamma = n_beta / tau: the posterior's kernel is 1 / (x + 1 / tau), F_tau no smaller and at most 1.2985 of it."""
    tau = 3.7
    x = np.concatenate([[0.0], np.geomspace(1e-4, 1e4, 4001)]) / tau
    ratio = -responses(x, Steps(np.full(3, tau / 3)))[0].sum(axis=0) * (x + 1 / tau)
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
