"""chi must equal its formula written out, entry by entry; errors must be those of its parts."""

from __future__ import annotations

import numpy as np
import pytest

from patterning_dist.errors import PatterningError
from patterning_dist.response.moments import CoMoments
from patterning_dist.response.susceptibility import susceptibility

CHAINS, DRAWS, PROBES = 3, 48, 7


def simulate(seed, num_chains=CHAINS, num_draws=DRAWS, shift=0.0):
    """phi [chain, draw, observable], losses [chain, draw, probe] as deviations, l_i(w*) [probe]."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(num_chains, num_draws, 3)) + shift
    losses = hidden @ rng.normal(size=(3, PROBES)) + 0.1 * rng.normal(size=(num_chains, num_draws, PROBES))
    phi = np.stack([losses.mean(-1), hidden[..., 0] ** 2], axis=-1)
    return phi, losses, rng.uniform(1, 5, size=PROBES)


def chains_of(phi, losses, num_batches=8):
    result = []
    for chain, (one_phi, one_losses) in enumerate(zip(phi, losses, strict=True)):
        moments = CoMoments.empty(chain, len(one_phi), one_phi.shape[1], one_losses.shape[1], num_batches)
        moments.update(one_phi, one_losses)
        result.append(moments)
    return result


def two_posterior_formula(phi, raw, raw_full):
    """E_C[phi pt] - E_C[phi l] - E_C[phi] (E_full[pt] - E_full[l]), pt = the probe's mean loss at a draw."""

    def mean(values):
        return values.reshape(-1, *values.shape[2:]).mean(0)

    pt, pt_full = raw.mean(-1), raw_full.mean(-1)
    first = mean(phi * pt[..., None])[:, None]
    second = mean(phi[..., :, None] * raw[..., None, :])
    return first - second - mean(phi)[:, None] * (mean(pt_full) - mean(raw_full))


def test_full_baseline_equals_the_formula_on_raw_losses():
    phi, losses, at_center = simulate(0)
    _, losses_full, _ = simulate(1, num_chains=2, num_draws=80, shift=0.3)
    wanted = two_posterior_formula(phi, losses + at_center, losses_full + at_center)
    full = chains_of(np.zeros((2, 80, 1)), losses_full)
    for shift in (0.0, at_center):
        chains = chains_of(phi, losses + shift)
        full = chains_of(np.zeros((2, 80, 1)), losses_full + shift)
        result = susceptibility(chains, baseline="full", full=full)
        np.testing.assert_allclose(result.chi, wanted, rtol=1e-10, atol=1e-12)


def test_full_baseline_of_the_chains_themselves_is_the_pooled_covariance():
    phi, losses, at_center = simulate(2)
    chains = chains_of(phi, losses)
    result = susceptibility(chains, baseline="full", full=chains)
    wanted = two_posterior_formula(phi, losses + at_center, losses + at_center)
    np.testing.assert_allclose(result.chi, wanted, rtol=1e-10, atol=1e-12)
    contrast = losses - losses.mean(-1, keepdims=True)
    pooled = np.cov(phi[..., 1].ravel(), contrast[..., 4].ravel(), ddof=0)[0, 1]
    assert result.chi[1, 4] == pytest.approx(-pooled, rel=1e-10)
    copies = susceptibility(chains, baseline="full", full=chains_of(phi, losses))
    np.testing.assert_allclose(copies.chi, result.chi, rtol=1e-10, atol=1e-12)
    # Taken for independent, the baseline adds an error that is not there.
    shifted = chains_of(phi + 50.0, losses)
    same = susceptibility(shifted, baseline="full", full=shifted).standard_error
    np.testing.assert_allclose(same, result.standard_error, rtol=1e-8)


def test_restricted_baseline_is_the_formula_with_each_chain_as_its_own_baseline():
    phi, losses, at_center = simulate(3)
    raw = losses + at_center
    each = np.array([two_posterior_formula(phi[c : c + 1], raw[c : c + 1], raw[c : c + 1]) for c in range(CHAINS)])
    # What centring takes away is the covariance of the means, here by four pairs of the eight batches.
    contrast = losses - losses.mean(-1, keepdims=True)
    pairs = [values.reshape(CHAINS, 4, DRAWS // 4, -1).mean(2) for values in (phi, contrast)]
    a, b = (values - values.mean(1, keepdims=True) for values in pairs)
    each -= np.einsum("cgk,cgm->ckm", a, b) / (4 * 3)
    result = susceptibility(chains_of(phi, losses))
    np.testing.assert_allclose(result.chi, each.mean(axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(result.chi_per_chain, each, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(result.chi.sum(axis=1), 0, atol=1e-13)


def test_constants_in_phi_change_the_full_baseline_only():
    phi, losses, _ = simulate(4)
    _, losses_full, _ = simulate(5, shift=0.5)
    full = chains_of(phi, losses_full)
    plain, moved = chains_of(phi, losses), chains_of(phi + 2.0, losses)
    np.testing.assert_allclose(susceptibility(plain).chi, susceptibility(moved).chi, atol=1e-12)
    contrast = (losses - losses.mean(-1, keepdims=True)).mean((0, 1))
    contrast_full = (losses_full - losses_full.mean(-1, keepdims=True)).mean((0, 1))
    difference = susceptibility(moved, baseline="full", full=full).chi
    difference = difference - susceptibility(plain, baseline="full", full=full).chi
    np.testing.assert_allclose(difference, np.tile(-2.0 * (contrast - contrast_full), (2, 1)), atol=1e-12)


def test_weights_leave_appended_columns_out_of_the_mean():
    phi, losses, _ = simulate(6)
    appended = np.concatenate([losses, losses[..., :2].mean(-1, keepdims=True)], axis=-1)
    weights = np.append(np.full(PROBES, 3.0), 0.0)
    result = susceptibility(chains_of(phi, appended), loss_weights=weights)
    alone = susceptibility(chains_of(phi, losses))
    np.testing.assert_allclose(result.chi[:, :PROBES], alone.chi, atol=1e-13)
    np.testing.assert_allclose(result.chi[:, PROBES], alone.chi[:, :2].mean(axis=1), atol=1e-13)
    for bad in (np.zeros(8), -np.ones(8), np.ones(3), np.full(8, np.nan)):
        with pytest.raises(PatterningError, match="loss_weights: expected 8 finite weights"):
            susceptibility(chains_of(phi, appended), loss_weights=bad)


def test_standard_errors_are_those_of_batch_means_and_of_chains():
    phi, losses, _ = simulate(7)
    result = susceptibility(chains_of(phi, losses, num_batches=8))
    contrast = losses - losses.mean(-1, keepdims=True)
    variance = 0.0
    for chain in range(CHAINS):
        a, b = phi[chain] - phi[chain].mean(0), contrast[chain] - contrast[chain].mean(0)
        products = (a[:, :, None] * b[:, None, :]).reshape(8, DRAWS // 8, 2, PROBES).mean(1)
        pairs = products.reshape(4, 2, 2, PROBES).mean(1)
        variance = variance + np.maximum(products.var(0, ddof=1) / 8, pairs.var(0, ddof=1) / 4)
    np.testing.assert_allclose(result.standard_error_batch, np.sqrt(variance) / CHAINS, rtol=1e-9)
    between = result.chi_per_chain.std(0, ddof=1) / np.sqrt(CHAINS)
    np.testing.assert_allclose(result.standard_error_between, between, rtol=1e-12)
    larger = np.maximum(result.standard_error_batch, between)
    np.testing.assert_allclose(result.standard_error, larger, rtol=1e-12)


def test_independent_baseline_adds_its_noise():
    phi, losses, _ = simulate(8)
    _, losses_full, _ = simulate(9)
    wide, narrow = (
        chains_of(phi, losses_full),
        chains_of(phi, np.broadcast_to(losses_full.mean((0, 1)), losses.shape)),
    )
    chains = chains_of(phi, losses)
    with_noise = susceptibility(chains, baseline="full", full=wide)
    without = susceptibility(chains, baseline="full", full=narrow)
    np.testing.assert_allclose(with_noise.chi, without.chi, atol=1e-12)
    contrast = losses_full - losses_full.mean(-1, keepdims=True)
    batches = contrast.reshape(CHAINS, 8, DRAWS // 8, PROBES).mean(2)
    by_batch = (batches.var(1, ddof=1) / 8).mean(0) / CHAINS
    by_chain = contrast.mean(1).var(0, ddof=1) / CHAINS
    added = phi.mean((0, 1))[:, None] ** 2 * np.maximum(by_batch, by_chain)
    got = with_noise.standard_error_batch**2 - without.standard_error_batch**2
    np.testing.assert_allclose(got, added, rtol=1e-8, atol=1e-14)


def test_one_chain_uses_batch_means():
    phi, losses, _ = simulate(10, num_chains=1)
    result = susceptibility(chains_of(phi, losses))
    assert np.isnan(result.standard_error_between).all()
    np.testing.assert_array_equal(result.standard_error, result.standard_error_batch)
    assert (result.standard_error > 0).all()


def test_too_few_chains_names_the_excluded_and_why():
    phi, losses, _ = simulate(11)
    chains = chains_of(phi, losses)[:1]
    with pytest.raises(PatterningError, match=r"1 healthy chains, expected at least 2 .*chain 4 excluded: NaN at 7"):
        susceptibility(chains, min_chains=2, excluded={4: "NaN at 7"})
    with pytest.raises(PatterningError, match="0 healthy chains, expected at least 1"):
        susceptibility([])
    assert susceptibility(chains, excluded={4: "NaN"}).excluded == {4: "NaN"}


def test_wrong_baselines_and_shapes_are_named():
    phi, losses, _ = simulate(12)
    chains = chains_of(phi, losses)
    with pytest.raises(PatterningError, match="'full' needs the chains of the whole model"):
        susceptibility(chains, baseline="full")
    with pytest.raises(PatterningError, match="baseline: got 'delta'"):
        susceptibility(chains, baseline="delta")
    with pytest.raises(PatterningError, match="chain 1: 2 observables and 6 probe columns, expected 2 and 7"):
        susceptibility([chains[0], chains_of(phi, losses[..., 1:])[1]])
    started = CoMoments.empty(9, DRAWS, 2, PROBES)
    with pytest.raises(PatterningError, match="chain 9: 0 draws, expected at least 2"):
        susceptibility([chains[0], started])
