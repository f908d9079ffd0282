"""Lanczos on operators whose spectrum is known, and on the Hessian of a loss at a checkpoint."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from patterning_dist.models.components import select_component
from patterning_dist.sampling.lanczos import lanczos, ritz, spectrum_ends
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.target import Target

torch.set_num_threads(1)


def dot(a, b):
    return sum((a[name].double() * b[name].double()).sum().item() for name in a)


def flat(vector):
    return torch.cat([v.flatten() for v in vector.values()])


def problem(size=60, dtype=torch.float64, seed=0):
    """(matrix, its product on vectors of two pieces, start): two eigenvalues stand out at the top, one is negative."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat([torch.tensor([-3.0, 40.0, 90.0]), torch.linspace(0.1, 8, size - 3)]).double()
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    matrix = (rotation * values) @ rotation.T

    def product(vector):
        image = (matrix @ flat(vector).double()).to(dtype)
        return {"a": image[:10].reshape(2, 5), "b": image[10:]}

    start = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    return matrix, product, {"a": start[:10].reshape(2, 5), "b": start[10:]}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_the_basis_is_orthonormal_and_makes_the_operator_tridiagonal(dtype, tolerance):
    matrix, product, start = problem(dtype=dtype)
    basis, alphas, betas = lanczos(product, start, dot, 20)
    assert len(basis) == len(alphas) == len(betas) == 20
    q = torch.stack([flat(v) for v in basis], dim=1).double()
    torch.testing.assert_close(q.T @ q, torch.eye(20, dtype=torch.float64), rtol=0, atol=tolerance)
    tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    for k, beta in enumerate(betas[:-1]):
        tridiagonal[k, k + 1] = tridiagonal[k + 1, k] = beta
    torch.testing.assert_close(q.T @ matrix @ q, tridiagonal, rtol=0, atol=90 * tolerance)
    # What is left over is one vector, of length beta_m.
    rest = matrix @ q - q @ tridiagonal
    assert rest[:, :-1].abs().max() < 90 * tolerance
    assert rest[:, -1].norm().item() == pytest.approx(betas[-1], rel=1e-4)
    torch.testing.assert_close(q[:, 0], flat(start).double() / flat(start).double().norm(), rtol=0, atol=tolerance)


def test_the_ends_are_found_first_and_their_errors_are_bounds():
    matrix, product, start = problem()
    eigenvalues = torch.linalg.eigvalsh(matrix)
    largest = []
    for num_steps in (2, 4, 8, 14):
        _, alphas, betas = lanczos(product, start, dot, num_steps)
        values, vectors = ritz(alphas, betas)
        for value, error in zip(values, (betas[-1] * vectors[-1]).abs(), strict=True):
            assert (eigenvalues - value).abs().min() <= error + 1e-9
        assert eigenvalues[0] - 1e-9 <= values[0] and values[-1] <= eigenvalues[-1] + 1e-9
        largest.append(values[-1].item())
    assert all(b >= a - 1e-9 for a, b in pairwise(largest))
    assert largest[-1] == pytest.approx(90, rel=1e-6)
    assert values[0].item() == pytest.approx(-3, abs=0.05)


def test_a_space_that_closes_ends_the_iteration():
    """Three different eigenvalues: three vectors, and the eigenvalues themselves."""
    scale = torch.tensor([2.0] * 5 + [7.0] * 4 + [-1.0])
    basis, alphas, betas = lanczos(lambda v: {"x": scale * v["x"]}, {"x": torch.arange(1.0, 11.0)}, dot, 9)
    assert len(basis) == len(alphas) == len(betas) == 3
    torch.testing.assert_close(ritz(alphas, betas)[0], torch.tensor([-1.0, 2.0, 7.0]).double(), rtol=1e-5, atol=1e-5)
    _, alphas, betas = lanczos(lambda v: {"x": 5 * v["x"]}, {"x": torch.ones(4)}, dot, 3)
    assert alphas == [pytest.approx(5)] and betas == [pytest.approx(0, abs=1e-6)]


def test_the_ends_of_a_loss_are_those_of_its_hessian():
    """n_beta H + gamma of a regression with a saddle: inputs have known second moments, and one is subtracted."""
    moments = torch.tensor([9.0, 2.0, 0.5, 1.0])
    inputs = torch.cat([torch.diag((4 * moments).sqrt()), -torch.diag((4 * moments).sqrt())])
    model = nn.Linear(4, 1, bias=False)

    def losses(model, batch):
        return model(batch[0])[:, 0].square() * torch.where(batch[0][:, 3] == 0, 0.5, -0.5)

    data = TensorDataset(inputs)
    target = Target(model, select_component(model, "everything"), losses, data, data)
    ends, stiff = spectrum_ends(target, Posterior(30.0, 7.0), target.prepare(data), 10, seed=3)
    assert ends.largest == pytest.approx(30 * 9 + 7, rel=1e-4)
    assert ends.smallest == pytest.approx(-30 * 1 + 7, rel=1e-3)
    assert ends.largest_error < 1 and ends.smallest_error < 1
    assert np.isfinite(ends).all()
    # 277, 67, 22 and -23: one direction has at least half the largest precision.
    torch.testing.assert_close(stiff["weight"].abs(), torch.tensor([[[1.0, 0, 0, 0]]]), rtol=0, atol=1e-3)
    _, both = spectrum_ends(target, Posterior(3.0, 70.0), target.prepare(data), 10, seed=3)  # 97, 76, 72, 67
    square = both["weight"].flatten(1) @ both["weight"].flatten(1).T
    torch.testing.assert_close(square, torch.eye(4), rtol=0, atol=1e-5)
