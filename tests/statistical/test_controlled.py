"""Susceptibilities with a control, from independent draws of a posterior, against closed forms and quadrature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaussian_problem import Problem
from scipy.optimize import minimize
from scipy.stats import t as student
from torch import nn
from torch.utils.data import TensorDataset

from patterning_dist import CoMoments, PatterningError, Posterior, sample_chains
from patterning_dist.models.components import select_component
from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.sampling.chain import ChainSettings
from patterning_dist.sampling.controlled import Controlled
from patterning_dist.sampling.statistics import Draw
from patterning_dist.sampling.target import Target

torch.set_num_threads(1)
NUM_CHAINS, NUM_DRAWS = 4, 32


class Point(nn.Module):
    """w alone."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.as_tensor(w, dtype=torch.float32))


class Case:
    """Losses of samples at a point, an observable, and chains of whatever draws.

    Args:
        center: w*.
        losses: (model, batch) -> [sample].
        data: training samples and probe.
        phi: model -> its one number.
        posterior: n_beta and gamma.
        batch_size: of the minibatch that z is of.
    """

    def __init__(self, center, losses, data, phi, posterior, batch_size):
        model = Point(center)
        self.target = Target(model, select_component(model, "everything"), losses, data, data, functions=(phi,))
        self.settings = ChainSettings(posterior, 1.0, batch_size, 0, NUM_DRAWS, 1, seed=0)

    def measured(self, draws, control, first=0):
        """Susceptibilities without and with a control, of draws [chain, draw, coordinate]."""
        target, (plain, controlled) = self.target, ([], [])
        for number, positions in enumerate(draws, start=first):
            target.move_to(target.center)
            center, num_samples = target.measure(), len(target.data)
            statistic = Controlled(
                target, self.settings, number, population=num_samples, controls=[(0, control)], num_batches=8
            )
            plain.append(CoMoments.empty(number, NUM_DRAWS, 1, num_samples, 8))
            for t, w in enumerate(torch.from_numpy(positions).float()):
                target.move_to({"w": w})
                here = target.measure()
                phi, losses = (here.observables - center.observables).numpy(), (here.losses - center.losses).numpy()
                plain[-1].update(phi[None], losses[None])
                statistic.update(Draw(t, phi, losses, here.mean_loss - center.mean_loss), target)
            controlled.append(CoMoments.from_state_dict(statistic.result()).columns(slice(-1)))
        return susceptibility(plain), susceptibility(controlled)

    def repeated(self, draw, control, truth, num_repeats):
        """Of both estimators: their mean less the truth in standard errors [sample], variance [sample], coverage."""
        found = [
            self.measured(draw((NUM_CHAINS, NUM_DRAWS)), control, first=NUM_CHAINS * repeat)
            for repeat in range(num_repeats)
        ]
        result = []
        for results in zip(*found, strict=True):
            chi, ends = np.stack([r.chi[0] for r in results]), np.stack([r.interval() for r in results])[:, :, 0]
            off = (chi.mean(axis=0) - truth) / (chi.std(axis=0, ddof=1) / num_repeats**0.5)
            covered = np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1]))
            result.append((off, chi.var(axis=0, ddof=1), covered))
        return result


def size(z):
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(z))))


# A mean of REPEATS estimates, in its own standard errors, is a t; samples go together, so that the root mean square
# over them is at worst one such number. Of the coverage likewise: at worst every repeat covers all samples or none.
REPEATS = 24
FAR = float(student.ppf(0.9995, REPEATS - 1))
LEAST_COVERAGE = 0.95 - 3 * (0.95 * 0.05 / REPEATS) ** 0.5


# A Gaussian posterior

GAUSSIAN = Problem(3, 40.0, 5.0, stiffness=0.5, num_samples=12)
SLOPE = np.random.default_rng(5).normal(size=3)


def quadratic(model, batch):
    away = model.w - batch[1]
    return 0.5 * torch.einsum("bd,bde,be->b", away, batch[0], away)


def gaussian(bent, batch_size, covariance=GAUSSIAN.covariance):
    """Case, truth and draws; phi is slope . w + bent w_0^2.

    -Cov(phi, l_i - L) = -( (slope + 2 bent m_0 e_0)^T S g_i + bent (S H_i S)_00 ) less its mean, g_i = H_i (m - a_i).
    """
    p, rng = GAUSSIAN, np.random.default_rng(1)
    data = TensorDataset(torch.from_numpy(p.hessians).float(), torch.from_numpy(p.optima).float())
    slope = torch.from_numpy(SLOPE).float()
    case = Case(p.center, quadratic, data, lambda m: slope @ m.w + bent * m.w[0] ** 2, p.posterior, batch_size)
    gradients = np.einsum("ide,ie->id", p.hessians, p.mean - p.optima)
    exact = gradients @ p.covariance @ (SLOPE + np.array([2 * bent * p.mean[0], 0, 0]))
    exact += bent * np.einsum("a,iab,b->i", p.covariance[0], p.hessians, p.covariance[0])
    return case, exact.mean() - exact, lambda shape: rng.multivariate_normal(p.mean, covariance, size=shape)


@pytest.mark.parametrize(
    ("control", "batch_size", "gain"),
    [("langevin_stein", 12, 1.5), ("linear", 4, 1.5), ("langevin_stein", 4, 0.8)],  # noise in z: no gain, no loss
)
def test_a_gaussian_posterior(control, batch_size, gain):
    case, truth, draw = gaussian(0.3, batch_size)
    plain, controlled = case.repeated(draw, control, truth, REPEATS)
    for off, _, coverage in (plain, controlled):
        assert size(off) < FAR
        assert coverage > LEAST_COVERAGE
    assert np.mean(plain[1] / controlled[1]) > gain


@pytest.mark.parametrize("control", ["langevin_stein", "linear"])
def test_the_heat_of_large_steps_is_taken_out_of_the_linear_part(control):
    """Draws of the law that steps of ``sgld`` leave, variances 1 / (P (1 - eps P / 4)), about the posterior's chi."""
    hot = GAUSSIAN.recursion_covariance(5 * GAUSSIAN.step_size)
    case, truth, draw = gaussian(0.0, 12, hot)
    plain, controlled = case.repeated(draw, control, truth, REPEATS)
    assert size(plain[0]) > 2 * FAR
    assert size(controlled[0]) < FAR


# Logistic regression: skewed, and no Gaussian

LABELS = np.array([1, 1, -1, 1, 1, -1, 1, 1, 1, -1, 1, 1], float)
FEATURES = np.random.default_rng(3).normal(size=(12, 2)) + 0.8 * LABELS[:, None] * np.array([1.0, 0.4])
HELD_OUT = np.array([[1.0, 0.5], [0.5, -1.0]])
INVERSE_TEMPERATURE, LOCALIZATION = 30.0, 1.0


def logistic(model, batch):
    return nn.functional.softplus(-batch[1] * (batch[0] @ model.w))


def held_out(model):
    return nn.functional.softplus(-torch.from_numpy(HELD_OUT).float() @ model.w).mean()


def logistic_losses(w):
    return np.logaddexp(0, -(w @ FEATURES.T) * LABELS)


def regression(batch_size):
    """Case, truth by quadrature, and draws by rejection from the localisation, around the minimum of L."""
    center = minimize(lambda w: logistic_losses(w).mean(), np.zeros(2)).x
    lowest, rng = logistic_losses(center).mean(), np.random.default_rng(2)
    data = TensorDataset(torch.from_numpy(FEATURES).float(), torch.from_numpy(LABELS).float())
    case = Case(center, logistic, data, held_out, Posterior(INVERSE_TEMPERATURE, LOCALIZATION), batch_size)
    axis = np.linspace(-12, 12, 801)  # 6.5 standard deviations of the localisation alone
    grid = center + np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    losses = logistic_losses(grid)
    away = INVERSE_TEMPERATURE * (losses.mean(axis=1) - lowest) + LOCALIZATION / 2 * ((grid - center) ** 2).sum(axis=1)
    density = np.exp(-away) / np.exp(-away).sum()
    phi = np.logaddexp(0, -grid @ HELD_OUT.T).mean(axis=1)
    truth = -(density * (phi - density @ phi)) @ (losses - losses.mean(axis=1, keepdims=True))

    def draw(shape):
        found = np.zeros((0, 2))
        while len(found) < np.prod(shape):
            w = center + rng.normal(size=(4000, 2)) / LOCALIZATION**0.5
            rise = logistic_losses(w).mean(axis=1) - lowest
            found = np.concatenate([found, w[rng.uniform(size=len(w)) < np.exp(-INVERSE_TEMPERATURE * rise)]])
        return found[: np.prod(shape)].reshape(*shape, 2)

    return case, truth, draw


@pytest.mark.parametrize(("batch_size", "gain"), [(12, 1.5), (4, 0.8)])
def test_the_langevin_stein_control_is_exact_without_a_gaussian(batch_size, gain):
    case, truth, draw = regression(batch_size)
    plain, controlled = case.repeated(draw, "langevin_stein", truth, REPEATS)
    for off, _, coverage in (plain, controlled):
        assert size(off) < FAR
        assert coverage > LEAST_COVERAGE
    assert np.mean(plain[1] / controlled[1]) > gain


def test_the_linear_control_is_not():
    case, truth, draw = regression(12)
    plain, controlled = case.repeated(draw, "linear", truth, REPEATS)
    assert size(plain[0]) < FAR < size(controlled[0])


# The statistic itself


def test_going_on_from_a_state_gives_the_same():
    case, _, draw = gaussian(0.3, 4)
    positions = torch.from_numpy(draw(NUM_DRAWS)).float()
    controls = [(0, "langevin_stein"), (0, "linear")]

    def made(controls=controls):
        case.target.move_to(case.target.center)
        return Controlled(case.target, case.settings, 3, population=12, controls=controls, num_batches=8)

    def fed(statistic, draws):
        for t in draws:
            case.target.move_to({"w": positions[t]})
            here = case.target.measure()
            statistic.update(Draw(t, here.observables.numpy(), here.losses.numpy(), here.mean_loss), case.target)
        return statistic

    undisturbed, first, second = fed(made(), range(NUM_DRAWS)), fed(made(), range(13)), made()
    second.load_state_dict(first.state_dict())
    for name, values in fed(second, range(13, NUM_DRAWS)).result().items():
        np.testing.assert_array_equal(values, undisturbed.result()[name])
    alone = fed(made(controls[:1]), range(NUM_DRAWS))
    both = undisturbed.result()["comoment"]
    np.testing.assert_allclose(alone.result()["comoment"], both[:, :1], rtol=0, atol=1e-12 * np.abs(both).max())


def line(model):
    return model.w.sum()


def chains(**options):
    data = TensorDataset(torch.from_numpy(GAUSSIAN.hessians).float(), torch.from_numpy(GAUSSIAN.optima).float())
    settings = {"posterior": GAUSSIAN.posterior, "step_size": GAUSSIAN.step_size, "num_draws": 16, "num_chains": 2}
    observables = {"rounded": lambda model: model.w.detach().round().sum(), "line": line}
    return sample_chains(Point(GAUSSIAN.center), quadratic, data, data, observables=observables, **settings, **options)


def test_chains_from_python():
    plain, controlled = chains(), chains(controlled={"line": "langevin_stein"})
    np.testing.assert_array_equal(controlled.traces, plain.traces)  # the draws are the same
    assert plain.controlled == []
    assert [moments.comoment.shape for moments in controlled.controlled] == [(8, 1, 12)] * 2
    assert susceptibility(controlled.controlled).chi.sum() == pytest.approx(0, abs=1e-8)
    with pytest.raises(PatterningError, match="controlled: 'lines' is not among the observables"):
        chains(controlled={"lines": "linear"})
    with pytest.raises(PatterningError, match="function 0 of the observables has no gradient, which its control needs"):
        chains(controlled={"rounded": "linear"})
