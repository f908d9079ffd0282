"""Virial temperature and step bias of real chains on a Gaussian posterior, against their closed forms.

Sample i has the loss sum over r, k of h_k/2 (w_rk - a_irk)^2: rows r are independent problems that share the step. With
P = n_beta h + gamma and v the variance of n_beta grad L_batch, (n - B) / (n - 1) / B times that of one sample without
replacement, a step of sgld leaves

    var = (1 + eps v / 4) / (P (1 - eps P / 4)) ,   T = mean of P var ,   b = eps/8 sum ( (P - gamma) P var + v ) .
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from patterning_dist.response.failure_modes import failure_modes
from patterning_dist.response.llc import llc, trace_mean
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.sample import sample_chains
from patterning_dist.sampling.samplers import Sampler

torch.set_num_threads(1)

ROWS, SAMPLES, BATCH = 40, 24, 3
NOISE_SHARE = (SAMPLES - BATCH) / (SAMPLES - 1) / BATCH
INVERSE_TEMPERATURE, LOCALIZATION = 7.0, 3.0
CURVATURES = torch.tensor([0.4, 1.5, 6.0])
PRECISIONS = INVERSE_TEMPERATURE * CURVATURES.double().numpy() + LOCALIZATION
OPTIMA = 0.3 * torch.randn(SAMPLES, ROWS, 3, generator=torch.Generator().manual_seed(1))


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(OPTIMA.mean(dim=0) + 0.2)


def losses(model, batch):
    return 0.5 * (CURVATURES * (model.w - batch[0]).square()).sum(dim=(1, 2))


def sampled(stiffness, sampler=None, **options):
    """Four chains; ``stiffness`` is eps times the largest precision."""
    data, step_size = TensorDataset(OPTIMA), stiffness / PRECISIONS.max()
    settings = {"num_draws": 81, "steps_between_draws": 4, "burn_in": round(8 / (step_size * PRECISIONS.min()))}
    settings |= {"batch_size": BATCH, "num_chains": 4, "seed": 3} | options
    posterior = Posterior(INVERSE_TEMPERATURE, LOCALIZATION)
    return sample_chains(
        Point(), losses, data, data, posterior=posterior, step_size=step_size, sampler=sampler, **settings
    )


def closed_form(stiffness, noise_share=NOISE_SHARE):
    """(variance relative to the posterior's [row, curvature], T, b); the share is of the variance over samples."""
    step_size = stiffness / PRECISIONS.max()
    scores = INVERSE_TEMPERATURE * CURVATURES.double() * OPTIMA.double()
    noise = scores.var(dim=0, unbiased=False).numpy() * noise_share
    relative = (1 + step_size * noise / 4) / (1 - step_size * PRECISIONS / 4)
    return relative, relative.mean(), step_size / 8 * ((PRECISIONS - LOCALIZATION) * relative + noise).sum()


def exact_llc(relative):
    """n_beta E[L - L(w*)] where the variance is ``relative`` times that of the posterior, about the same mean."""
    curvatures, mean = CURVATURES.double().numpy(), OPTIMA.double().mean(dim=0).numpy()
    away = LOCALIZATION / PRECISIONS * (Point().w.detach().double().numpy() - mean)
    center = Point().w.detach().double().numpy() - mean
    energy = curvatures * (relative / PRECISIONS + away**2 - center**2)
    return INVERSE_TEMPERATURE / 2 * energy.sum()


def score(blocks, exact):
    mean = trace_mean(blocks)
    return (mean.value - exact) / mean.standard_error


def findings(found):
    return failure_modes(
        found.losses,
        inverse_temperature=INVERSE_TEMPERATURE,
        num_coordinates=3 * ROWS,
        temperatures=found.temperatures,
        step_biases=found.step_biases,
    )


@pytest.mark.parametrize("stiffness", [0.2, 0.6, 1.6])
def test_temperature_and_step_bias_are_those_of_the_recursion(stiffness):
    found = sampled(stiffness)
    relative, temperature, bias = closed_form(stiffness)
    assert found.temperatures.shape == found.step_biases.shape == (4, 32)
    assert abs(score(found.temperatures, temperature)) < 4
    assert abs(score(found.step_biases, bias)) < 4
    measured = llc(found.losses, INVERSE_TEMPERATURE)
    assert abs(measured.value - exact_llc(relative)) < 4 * measured.standard_error
    # Taken off, it leaves the posterior's LLC, or less by what noise in flat directions counts for.
    excess = exact_llc(relative) - exact_llc(1.0)
    assert excess <= bias < 1.6 * excess
    assert trace_mean(found.temperatures).standard_error < 0.03
    assert trace_mean(found.step_biases).standard_error < 0.06 * bias


def test_a_preconditioned_step_has_the_bias_of_its_own_steps():
    """V is the mean of all g^2 here, so that G comes to rest where var = (1 + eps G v / 4) / (P (1 - eps G P / 4))."""
    stability, step_size = 1.5, 1.5 / PRECISIONS.max()
    options = {"decay": 1.0, "stability": stability}
    found = sampled(1.5, Sampler("rmsprop_sgld", options), burn_in=400)
    curvatures, optima = CURVATURES.double().numpy(), OPTIMA.double().numpy()
    noise = (curvatures * optima).var(axis=0) * NOISE_SHARE
    away = LOCALIZATION / PRECISIONS * (Point().w.detach().double().numpy() - optima.mean(axis=0))
    scores, scale = INVERSE_TEMPERATURE**2 * noise, 1.0
    for _ in range(100):
        variance = (1 + step_size * scale * scores / 4) / (PRECISIONS * (1 - step_size * scale * PRECISIONS / 4))
        scale = 1 / (np.sqrt(curvatures**2 * (variance + away**2) + noise) + stability)
    bias = step_size / 8 * (scale * ((PRECISIONS - LOCALIZATION) * PRECISIONS * variance + scores)).sum()
    assert abs(score(found.temperatures, (PRECISIONS * variance).mean())) < 4
    assert abs(score(found.step_biases, bias)) < 4
    assert trace_mean(found.step_biases).standard_error < 0.05 * bias


def test_without_minibatch_noise_the_step_bias_is_the_llc_s_at_every_step_size():
    relative, _, bias = closed_form(1.2, noise_share=0.0)
    assert bias == pytest.approx(exact_llc(relative) - exact_llc(1.0), rel=1e-12)


def test_biased_chains_are_told_from_good_ones():
    good, biased = sampled(0.1, batch_size=24), sampled(1.2)
    assert [f.mode for f in findings(good) if f.mode in ("too_hot", "too_cold")] == []
    (finding,) = findings(biased)
    assert finding.mode == "too_hot" and finding.chains == (0, 1, 2, 3)
    assert finding.message.startswith("steps and minibatches heat the chains (virial temperature 1.")
    assert finding.message.endswith("or set sampling.gradient: control_variate")
    assert "which makes the LLC (" in finding.message
    assert finding.evidence["step_bias"] == pytest.approx(closed_form(1.2)[2], rel=0.1)


def test_chains_on_their_way_are_too_cold():
    cold = sampled(0.02, burn_in=0, num_draws=21, batch_size=24)
    (finding,) = [f for f in findings(cold) if f.mode == "too_cold"]
    assert finding.message.endswith("raise sampling.burn_in")


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler("rmsprop_sgld", {"decay": 1.0, "stability": 2.0}),
        Sampler("sgnht", {"diffusion": 0.1}),
    ],
    ids=lambda sampler: sampler.kind,
)
def test_other_samplers_are_at_one_where_their_steps_are_small(sampler):
    found = sampled(0.1, sampler, batch_size=24, burn_in=400)
    assert abs(score(found.temperatures, 1.0)) < 4
    assert found.step_biases.shape == (4, 0 if sampler.kind == "sgnht" else 32)
    assert trace_mean(found.temperatures).standard_error < 0.06


@pytest.mark.parametrize("sampler", [None, Sampler("sgnht", {"diffusion": 0.1})], ids=["sgld", "sgnht"])
def test_stiff_directions_have_a_temperature_of_their_own(sampler):
    """1 / (1 - eps P / 4) in the stiffest third: the mean over all hides most of it, that of a thermostat all of it."""
    found = sampled(2.0, sampler, batch_size=SAMPLES, burn_in=400, num_draws=301, lanczos_steps=6)
    assert found.stiff_temperatures.shape == (4, 32)
    relative = 1 / (1 - 2.0 / 4 * PRECISIONS / PRECISIONS.max())
    if sampler is not None:  # the thermostat cools all directions alike, until the mean is 1
        relative = relative / relative.mean()
        assert abs(score(found.temperatures, 1.0)) < 4
    stiff = trace_mean(found.stiff_temperatures)
    assert abs(score(found.stiff_temperatures, relative.max())) < 4
    assert stiff.value > 1.1 + 3 * stiff.standard_error
    hot = failure_modes(
        found.losses,
        inverse_temperature=INVERSE_TEMPERATURE,
        num_coordinates=3 * ROWS,
        temperatures=found.temperatures,
        stiff_temperatures=found.stiff_temperatures,
    )
    assert [f.evidence["temperature_stiff"] for f in hot] == [stiff.value]
    none = sampled(0.1, sampler, batch_size=SAMPLES, burn_in=400, lanczos_steps=6)
    assert abs(score(none.stiff_temperatures, 1 / (1 - 0.1 / 4))) < 4
    assert sampled(0.1, num_draws=8).stiff_temperatures.shape == (4, 0)


# What stands for the gradient


def test_the_control_variate_of_samples_with_one_hessian_is_the_full_gradient():
    """Minibatches add nothing then: the chain is that of the full gradient to rounding, and its bias is the step's."""
    options = {"stiffness": 0.6, "num_chains": 2, "seed": 5}
    full, controlled, plain = (sampled(gradient=g, **options) for g in ("full", "control_variate", "minibatch"))
    np.testing.assert_allclose(controlled.losses, full.losses, rtol=0, atol=1e-5 * np.abs(full.losses).max())
    assert np.abs(plain.losses - full.losses).max() > 0.1 * full.losses.std()
    _, temperature, bias = closed_form(0.6, noise_share=0.0)
    assert abs(score(controlled.temperatures, temperature)) < 4
    assert abs(score(controlled.step_biases, bias)) < 4
    # Far less than with the minibatch's own noise.
    assert closed_form(0.6)[2] > 1.5 * bias
    assert trace_mean(plain.step_biases).value > 1.4 * trace_mean(controlled.step_biases).value


SCALES, SLOPES = torch.linspace(0.1, 1.9, SAMPLES), 3 * (OPTIMA - OPTIMA.mean(dim=0))


def scaled_losses(model, batch):
    """s_i h/2 (w - w*)^2 + a_i (w - w*): Hessians and gradients that differ from sample to sample."""
    away = model.w - Point().w.detach()
    return 0.5 * batch[0] * (CURVATURES * away.square()).sum() + (batch[1] * away).sum(dim=(1, 2))


def test_noise_of_curvatures_is_what_a_control_variate_leaves():
    """var = (1 + eps/4 n_beta^2 Var(a) share) / (P - eps/4 (P^2 + n_beta^2 h^2 Var(s) share)), or without Var(a)."""
    data, step_size = TensorDataset(SCALES, SLOPES), 0.8 / PRECISIONS.max()
    options = {"num_draws": 81, "steps_between_draws": 4, "burn_in": 100, "batch_size": 2, "seed": 2}
    options |= {"posterior": Posterior(INVERSE_TEMPERATURE, LOCALIZATION), "step_size": step_size}
    controlled, plain = (
        sample_chains(Point(), scaled_losses, data, data, gradient=g, **options)
        for g in ("control_variate", "minibatch")
    )
    share = INVERSE_TEMPERATURE**2 * (SAMPLES - 2) / (SAMPLES - 1) / 2
    curved = (CURVATURES.double().numpy() ** 2) * SCALES.double().var(unbiased=False).item() * share
    noise = SLOPES.double().var(dim=0, unbiased=False).numpy() * share
    relative = PRECISIONS / (PRECISIONS - step_size / 4 * (PRECISIONS**2 + curved))
    assert abs(score(controlled.temperatures, relative.mean())) < 4
    assert abs(score(plain.temperatures, ((1 + step_size / 4 * noise) * relative).mean())) < 4
    assert trace_mean(controlled.temperatures).standard_error < 0.02 < 0.1 < relative.mean() - 1
    assert trace_mean(plain.temperatures).value > relative.mean() + 0.06


def test_a_minibatch_of_all_samples_is_the_full_gradient():
    """The same chain to the bit: with replacement there was noise even then."""
    options = {"stiffness": 0.6, "num_chains": 2, "num_draws": 21, "seed": 6}
    full, everything = sampled(gradient="full", **options), sampled(batch_size=SAMPLES, **options)
    np.testing.assert_array_equal(everything.losses, full.losses)
    np.testing.assert_array_equal(everything.temperatures, full.temperatures)


# A posterior that is no Gaussian: a tanh unit, by quadrature

INPUTS = 1.5 * torch.randn(30, generator=torch.Generator().manual_seed(4))
OUTPUTS = 0.8 * torch.tanh(1.2 * INPUTS) + 0.3 * torch.randn(30, generator=torch.Generator().manual_seed(5))
CENTER = torch.tensor([1.2, 0.8])


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(CENTER.expand(ROWS, 2).clone())


def unit_losses(model, batch):
    return 0.5 * (torch.tanh(batch[0][:, None] * model.w[:, 0]) * model.w[:, 1] - batch[1][:, None]).square().sum(1)


def unit_llc(inverse_temperature, localization):
    """n_beta E[L - L(w*)] of one row."""
    a, b = np.meshgrid(np.linspace(-2, 6, 600), np.linspace(-2, 4, 400), indexing="ij")
    pairs = zip(INPUTS.double().numpy(), OUTPUTS.double().numpy(), strict=True)
    rise = np.mean([(np.tanh(x * a) * b - y) ** 2 - (np.tanh(x * 1.2) * 0.8 - y) ** 2 for x, y in pairs], axis=0) / 2
    density = np.exp(-inverse_temperature * rise - localization / 2 * ((a - 1.2) ** 2 + (b - 0.8) ** 2))
    return inverse_temperature * (rise * density).sum() / density.sum()


@pytest.mark.parametrize(("gradient", "excess"), [("minibatch", 0.3), ("full", 0.1)])
def test_the_step_bias_of_a_tanh_unit_is_what_its_llc_is_too_large_by(gradient, excess):
    """To first order in eps: a fifth of the bias itself is allowed for the second."""
    data, posterior = TensorDataset(INPUTS, OUTPUTS), Posterior(60.0, 4.0)
    found = sample_chains(
        Unit(),
        unit_losses,
        data,
        data,
        posterior=posterior,
        step_size=0.02,
        num_draws=121,
        steps_between_draws=4,
        burn_in=200,
        batch_size=3,
        gradient=gradient,
    )
    measured, bias = llc(found.losses, 60.0), trace_mean(found.step_biases)
    wanted = measured.value - ROWS * unit_llc(60.0, 4.0)
    error = np.hypot(measured.standard_error, bias.standard_error)
    assert wanted > excess * measured.value
    assert abs(bias.value - wanted) < 0.2 * wanted + 4 * error
    assert 4 * error < 0.5 * wanted
    assert trace_mean(found.temperatures).value > 1.05
