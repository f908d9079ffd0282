"""Settings that calibration chooses give chi and LLC within two standard errors of the truth.

The functions that `patterning calibrate` calls, without Ray: curvature, proposal, trials, judgement, plan; then a run
of the planned length at the chosen setting. Truths: a Gaussian of two scales in closed form, a tanh unit by quadrature.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from patterning_dist.models.components import select_component
from patterning_dist.response.calibration import assess
from patterning_dist.response.llc import llc
from patterning_dist.response.proposal import precisions, propose, search, spacing
from patterning_dist.response.run_length import judge_bias, plan_run
from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.runtime.chains.trials import TrialPlan, loss_curvature, run_trial
from patterning_dist.sampling.chain import Chain, ChainSettings
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.sample import sample_chains
from patterning_dist.sampling.target import Target

torch.set_num_threads(1)


class Study:
    """What a worker of a calibration holds: chains of one model."""

    def __init__(self, model, losses, data, functions, **settings):
        self.model, self.losses, self.data, self.functions = model, losses, data, functions
        self.settings = ChainSettings(**settings)

    def chain(self, name, number, **changes):
        model = type(self.model)()
        target = Target(
            model,
            select_component(model, name),
            self.losses,
            self.data,
            self.data,
            functions=tuple(self.functions.values()),
            num_component_losses=1,
        )
        return Chain(target, replace(self.settings, **changes), number, population=len(self.data))


def calibrated(study, n_beta, gamma, standard_error, num_draws=60, num_chains=4):
    """(curvature, what came of the settings, the best first, plan of a run at it)."""
    ends = loss_curvature(study, "everything")
    curvature = (ends.smallest, ends.largest)
    plan = TrialPlan("everything", num_chains, num_draws, len(study.data), takes_gradients=False)
    found = propose(curvature, [n_beta], [gamma], None, standard_error=standard_error, is_raised=True)
    lengths = {"standard_error": standard_error, "num_chains": 4, "min_draws": 16, "num_subjects": 1, "num_workers": 1}

    def run(settings):
        return {s: [run_trial(study, plan, s, c, steps) for c in range(num_chains)] for s, steps in settings.items()}

    def judge(setting, trials, steps):
        one = assess(setting, trials, ["component_loss", *study.functions], steps)
        stiffness = setting.step_size * precisions(curvature, *setting.posterior)[1]
        return one if one.failure else judge_bias(one, plan_run(one, **lengths), standard_error, stiffness)

    ranked, _ = search(found.settings, run, judge, lambda setting: spacing(setting, curvature, num_draws), False)
    return curvature, ranked, plan_run(ranked[0], **lengths)


def full_run(study, setting, plan, seed=11):
    """The run that a calibrated configuration stands for."""
    return sample_chains(
        study.model,
        study.losses,
        study.data,
        study.data,
        posterior=Posterior(setting.inverse_temperature, setting.localization),
        step_size=setting.step_size,
        observables=study.functions,
        num_chains=plan.num_chains,
        num_draws=plan.num_draws,
        burn_in=plan.burn_in,
        steps_between_draws=plan.steps_between_draws,
        batch_size=study.settings.batch_size,
        gradient=study.settings.gradient,
        seed=seed,
    )


def relative_errors(found, n_beta, chi, coefficient):
    """Errors of chi [observable] and of the LLC, in standard errors: root mean square over the samples."""
    estimate = susceptibility(found.chains)
    off = np.sqrt(np.mean((estimate.chi - chi) ** 2, axis=1) / np.mean(estimate.standard_error**2, axis=1))
    measured = llc(found.losses, n_beta)
    return off, abs(measured.value - coefficient) / measured.standard_error


# A Gaussian of two scales: l_i = sum_k s_ik h_k/2 w_k^2 + a_ik w_k, s of mean 1 and a of mean 0 over the samples

SAMPLES, SOFT, STIFF = 24, 8, 4
CURVATURES = torch.tensor([1.0] * SOFT + [400.0] * STIFF)
GENERATOR = torch.Generator().manual_seed(1)
SCALES = torch.rand(SAMPLES, SOFT + STIFF, generator=GENERATOR)
SCALES = SCALES / SCALES.mean(dim=0)
SLOPES = torch.randn(SAMPLES, SOFT + STIFF, generator=GENERATOR) * CURVATURES.sqrt()
SLOPES = SLOPES - SLOPES.mean(dim=0)
DIRECTION = CURVATURES.sqrt() * torch.randn(SOFT + STIFF, generator=GENERATOR)


class Gaussian(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(SOFT + STIFF))


def gaussian_losses(model, batch):
    return (batch[0] * CURVATURES / 2 * model.w.square() + batch[1] * model.w).sum(dim=1)


def test_a_gaussian_of_two_scales():
    """chi_i(L) = -sum (s_ik - 1) (h_k / P_k)^2 / 2, chi_i(u w) = -sum u_k a_ik / P_k, LLC sum n_beta h_k / P_k / 2."""
    n_beta, gamma, standard_error = 10.0, 100.0, 0.2
    study = Study(
        Gaussian(),
        gaussian_losses,
        TensorDataset(SCALES, SLOPES),
        {"along": lambda model: model.w @ DIRECTION},
        posterior=Posterior(n_beta, gamma),
        step_size=1.0,
        batch_size=4,
        burn_in=0,
        num_draws=1,
        steps_between_draws=1,
        seed=5,
        gradient="control_variate",
    )
    curvature, ranked, plan = calibrated(study, n_beta, gamma, standard_error)
    assert curvature == (pytest.approx(1, abs=0.05), pytest.approx(400, rel=1e-3))
    best = ranked[0]
    assert best.failure == "" and best.setting.step_size <= 0.2 / (n_beta * 400 + gamma) * 1.01
    h = CURVATURES.double().numpy()
    precision = n_beta * h + gamma
    chi = np.stack(
        [
            -0.5 * (SCALES.double().numpy() - 1) @ (h / precision) ** 2,
            -SLOPES.double().numpy() @ (DIRECTION.double().numpy() / precision),
        ]
    )
    off, of_llc = relative_errors(full_run(study, best.setting, plan), n_beta, chi, (n_beta * h / precision).sum() / 2)
    assert (off < 2).all() and of_llc < 2


# A tanh unit, no Gaussian: several rows that share the step, by quadrature of one

ROWS, CENTER = 8, (1.2, 0.8)
INPUTS = 1.5 * torch.randn(24, generator=torch.Generator().manual_seed(4))
OUTPUTS = 0.8 * torch.tanh(1.2 * INPUTS) + 0.3 * torch.randn(24, generator=torch.Generator().manual_seed(5))


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(CENTER).repeat(ROWS, 1))


def unit_losses(model, batch):
    return 0.5 * (torch.tanh(batch[0][:, None] * model.w[:, 0]) * model.w[:, 1] - batch[1][:, None]).square().sum(1)


def quadrature(n_beta, gamma):
    """chi_i = -Cov(L, l_i - L) and n_beta E[L - L(w*)], of all rows."""
    a, b = np.meshgrid(np.linspace(-2, 5, 500), np.linspace(-1, 3, 300), indexing="ij")
    pairs = list(zip(INPUTS.double().numpy(), OUTPUTS.double().numpy(), strict=True))
    rises = np.stack(
        [((np.tanh(x * a) * b - y) ** 2 - (np.tanh(x * CENTER[0]) * CENTER[1] - y) ** 2) / 2 for x, y in pairs]
    )
    mean = rises.mean(axis=0)
    density = np.exp(-n_beta * mean - gamma / 2 * ((a - CENTER[0]) ** 2 + (b - CENTER[1]) ** 2))
    density /= density.sum()
    level = (mean * density).sum()
    covariance = ((rises - mean) * (mean - level) * density).sum(axis=(1, 2))
    return -ROWS * covariance, n_beta * ROWS * level


def test_a_tanh_unit():
    n_beta, gamma, standard_error = 60.0, 4.0, 0.5
    study = Study(
        Unit(),
        unit_losses,
        TensorDataset(INPUTS, OUTPUTS),
        {},
        posterior=Posterior(n_beta, gamma),
        step_size=1.0,
        batch_size=8,
        burn_in=0,
        num_draws=1,
        steps_between_draws=1,
        seed=5,
        gradient="full",
    )
    _, ranked, plan = calibrated(study, n_beta, gamma, standard_error, num_draws=32, num_chains=3)
    best = ranked[0]
    assert best.failure == ""
    chi, coefficient = quadrature(n_beta, best.setting.localization)
    off, of_llc = relative_errors(full_run(study, best.setting, plan), n_beta, chi[None], coefficient)
    assert off < 2 and of_llc < 2
