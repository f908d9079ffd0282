"""The response direction against dense linear algebra, exact derivatives, and Gaussian posteriors in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from language_targets import language_target, language_task
from torch.func import functional_call, jvp

from patterning_dist.models.losses import token_losses
from patterning_dist.sampling.direction import conjugate_gradients, directional_losses, response_direction
from patterning_dist.sampling.posterior import Posterior

torch.set_num_threads(1)


def symmetric(eigenvalues, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))
    return q * eigenvalues @ q.T


def as_vector(flat):
    return {"a": torch.from_numpy(flat[:4]).reshape(2, 2), "b": torch.from_numpy(flat[4:])}


def as_flat(vector):
    return torch.cat([t.flatten() for t in vector.values()]).numpy()


def product_with(matrix):
    return lambda vector: as_vector(matrix @ as_flat(vector))


def dot(a, b):
    return sum((a[name].double() * b[name].double()).sum().item() for name in a)


def test_conjugate_gradients_solve():
    matrix, b = symmetric(np.geomspace(0.5, 40, 9)), np.random.default_rng(1).normal(size=9)
    right_side = as_vector(b)
    found = conjugate_gradients(product_with(matrix), right_side, dot, max_iterations=30, tolerance=1e-10)
    np.testing.assert_allclose(as_flat(found.vector), np.linalg.solve(matrix, b), rtol=1e-7)
    assert found.num_iterations <= 13
    assert found.relative_residual <= 1e-10
    assert not found.negative_curvature
    np.testing.assert_array_equal(as_flat(right_side), b)


def test_conjugate_gradients_stop_when_told():
    matrix, b = symmetric(np.geomspace(0.01, 100, 9)), np.random.default_rng(1).normal(size=9)
    found = conjugate_gradients(product_with(matrix), as_vector(b), dot, max_iterations=3, tolerance=1e-10)
    assert found.num_iterations == 3
    residual = np.linalg.norm(matrix @ as_flat(found.vector) - b) / np.linalg.norm(b)
    assert found.relative_residual == pytest.approx(residual, rel=1e-6)
    loose = conjugate_gradients(product_with(matrix), as_vector(b), dot, max_iterations=50, tolerance=0.3)
    residual = np.linalg.norm(matrix @ as_flat(loose.vector) - b) / np.linalg.norm(b)
    assert residual <= 0.3
    assert loose.num_iterations < 9
    none = conjugate_gradients(product_with(matrix), as_vector(0 * b), dot, max_iterations=50, tolerance=0.1)
    assert (none.num_iterations, none.relative_residual, as_flat(none.vector).any()) == (0, 0.0, False)


def test_negative_curvature_is_said():
    matrix, b = symmetric(np.array([-2.0, 1, 2, 3, 4, 5, 6, 7, 8])), np.random.default_rng(1).normal(size=9)
    found = conjugate_gradients(product_with(matrix), as_vector(b), dot, max_iterations=50, tolerance=1e-10)
    assert found.negative_curvature
    assert np.isfinite(as_flat(found.vector)).all()
    wholly = conjugate_gradients(product_with(-np.eye(9)), as_vector(b), dot, max_iterations=50, tolerance=1e-10)
    assert wholly.negative_curvature
    assert wholly.relative_residual == 1.0


# A tiny transformer


TOKENS = torch.from_numpy(np.random.default_rng(4).integers(0, 31, size=(19, 12)))  # two chunks of unequal size


def tiny(component):
    return language_target(language_task(TOKENS.numpy(), TOKENS.numpy()), component, TOKENS)


def random_vector(like, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(w.shape, generator=generator) for name, w in like.items()}


def exact_losses(restricted, free):
    """Per-token losses as a function of the free coordinates, for automatic differentiation."""
    parameters = {name: p.detach() for name, p in dict(restricted.model.named_parameters()).items()}
    for piece in restricted.component.pieces:
        whole = parameters[piece.parameter].clone()
        piece.view(whole)[...] = free[piece.name]
        parameters[piece.parameter] = whole
    return token_losses(functional_call(restricted.model, parameters, TOKENS[:, :-1]), TOKENS)


@pytest.mark.parametrize("component", ["layer.0.head.1", "layer.1.head.0"])
def test_hessian_products_are_those_of_the_dense_hessian(component):
    restricted = tiny(component)
    shapes = {name: w.shape for name, w in restricted.center.items()}
    sizes = [shape.numel() for shape in shapes.values()]

    def unflatten(flat):
        return {n: p.reshape(s) for (n, s), p in zip(shapes.items(), flat.split(sizes), strict=True)}

    def mean_loss(flat):
        return exact_losses(restricted, unflatten(flat)).mean()

    flat = torch.cat([w.flatten() for w in restricted.center.values()])
    hessian = torch.autograd.functional.hessian(mean_loss, flat)
    batch = restricted.prepare(TOKENS)
    for step in range(3):
        vector = random_vector(restricted.center, step)
        got = restricted.hessian_product(batch, vector)
        wanted = hessian @ torch.cat([v.flatten() for v in vector.values()])
        torch.testing.assert_close(torch.cat([g.flatten() for g in got.values()]), wanted, rtol=1e-3, atol=1e-5)
        assert wanted.abs().max() > 1e-3

    # ( n_beta H + gamma )^-1 g by conjugate gradients against a dense solve, with gamma above the negative curvature.
    gradient = random_vector(restricted.center, 9)
    lowest = torch.linalg.eigvalsh(hessian.double()).min().item()
    assert lowest < 0
    posterior = Posterior(inverse_temperature=30.0, localization=2.0 - 30.0 * lowest)
    solution = response_direction(restricted, posterior, gradient, batch, max_iterations=200, tolerance=1e-5)
    precision = 30.0 * hessian.double() + posterior.localization * torch.eye(len(flat), dtype=torch.float64)
    wanted = torch.linalg.solve(precision, torch.cat([g.flatten() for g in gradient.values()]).double())
    got = torch.cat([g.flatten() for g in solution.vector.values()]).double()
    assert (got - wanted).norm() < 1e-3 * wanted.norm()
    assert not solution.negative_curvature
    # Without iterations: g / gamma, and how far from solved that is.
    alone = response_direction(restricted, posterior, gradient, batch, max_iterations=0, tolerance=1e-5)
    torch.testing.assert_close(alone.vector, {n: g / posterior.localization for n, g in gradient.items()})
    g = torch.cat([g.flatten() for g in gradient.values()]).double()
    left_out = 30.0 * hessian.double() @ g / posterior.localization
    assert alone.relative_residual == pytest.approx((left_out.norm() / g.norm()).item(), rel=1e-3)
    weak = Posterior(inverse_temperature=30.0, localization=1e-3)
    assert response_direction(restricted, weak, gradient, batch, max_iterations=200, tolerance=1e-5).negative_curvature


@pytest.mark.parametrize("component", ["layer.1.head.0", "attention", "embedding+unembedding"])
def test_directional_losses_are_exact_derivatives(component):
    restricted = tiny(component)
    batch = restricted.prepare(TOKENS)
    moved = random_vector(restricted.center, 1)
    position = {n: w + 0.05 * moved[n] for n, w in restricted.center.items()}
    direction = {n: 3 * v for n, v in random_vector(restricted.center, 2).items()}
    _, exact = jvp(lambda free: exact_losses(restricted, free), (position,), (direction,))
    norm = sum(w.square().sum() for w in position.values()).sqrt().item()
    got = directional_losses(restricted, batch, position, direction, step=2e-3 * norm)
    assert got.shape == (19, 11)
    error = (got + exact.double()).abs()
    assert error.max() < 0.01 * exact.abs().max()
    assert np.corrcoef(got.flatten(), -exact.flatten())[0, 1] > 0.9999
    for name, w in restricted.live().items():
        assert torch.equal(w, position[name])
    nothing = directional_losses(restricted, batch, position, {n: 0 * d for n, d in direction.items()}, step=1e-3)
    assert nothing.shape == (19, 11)
    assert not nothing.any()


# A Gaussian posterior, where Stein's lemma is exact


class Quadratic:
    """l_i(w) = 1/2 (w - a_i)^T H_i (w - a_i); stands in for a restricted model."""

    def __init__(self, num_samples, dimension, seed):
        rng = np.random.default_rng(seed)
        roots = rng.normal(size=(num_samples, dimension, dimension))
        self.hessians = torch.from_numpy(roots @ roots.transpose(0, 2, 1) / dimension)
        self.optima = torch.from_numpy(rng.normal(size=(num_samples, dimension)))
        self.position = {}

    def dot(self, a, b):
        return dot(a, b)

    def move_to(self, position):
        self.position = {name: w.clone() for name, w in position.items()}

    def losses(self, batch):
        away = self.position["w"] - self.optima
        return 0.5 * torch.einsum("id,ide,ie->i", away, self.hessians, away)[:, None]

    def hessian_product(self, batch, vector):
        return {"w": self.hessians.mean(dim=0) @ vector["w"]}


@pytest.mark.parametrize(("inverse_temperature", "localization"), [(0.5, 2.0), (60.0, 3.0)])
def test_the_stein_form_is_the_covariance_of_a_linear_observable(inverse_temperature, localization):
    model, rng = Quadratic(7, 4, seed=2), np.random.default_rng(3)
    posterior = Posterior(inverse_temperature, localization)
    hessian = model.hessians.mean(dim=0).numpy()
    covariance = np.linalg.inv(inverse_temperature * hessian + localization * np.eye(4))
    mean, slope = rng.normal(size=4), rng.normal(size=4)  # phi = slope . w
    found = response_direction(
        model, posterior, {"w": torch.from_numpy(slope)}, None, max_iterations=20, tolerance=1e-12
    )
    np.testing.assert_allclose(found.vector["w"], covariance @ slope, rtol=1e-9)
    at_mean = {"w": torch.from_numpy(mean)}
    got = directional_losses(model, None, at_mean, found.vector, step=0.1)[:, 0].numpy()
    # Third moments of a Gaussian vanish, so Cov(phi, l_i) = slope^T S H_i (m - a_i) with nothing left over.
    gradients = np.einsum("ide,ie->id", model.hessians.numpy(), mean - model.optima.numpy())
    np.testing.assert_allclose(got, -gradients @ covariance @ slope, rtol=1e-8)
    # And against draws, so that signs and factors are those of a measured chi.
    w = rng.multivariate_normal(mean, covariance, size=100_000)
    away = w[:, None, :] - model.optima.numpy()
    losses = 0.5 * np.einsum("tid,ide,tie->ti", away, model.hessians.numpy(), away)
    phi = w @ slope - mean @ slope
    products = phi[:, None] * (losses - losses.mean(axis=0))
    z = (products.mean(axis=0) + got) / (products.std(axis=0) / np.sqrt(len(w)))
    assert np.abs(z).max() < 4.5
