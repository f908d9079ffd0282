"""The functions of Python warn of chains that have not mixed, and seldom of chains that have.

phi = w and l_i = a_i w + noise with w normal, autocorrelated with coefficient r from draw to draw: chi_i is -a_i less
its mean, and a chain of T draws has T (1 - r) / (1 + r) effective ones.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import patterning_dist as pd
from patterning_dist import ChainWarning, CoMoments

CHAINS, DRAWS, PROBES = 4, 480, 40


def walks(seed, coefficient, *, draws=DRAWS, start=0.0):
    """w [chain, draw] of autoregressions that start in their own law, plus `start` times the chain's number."""
    rng = np.random.default_rng(seed)
    w, kicks = np.empty((CHAINS, draws)), rng.normal(size=(CHAINS, draws))
    w[:, 0] = kicks[:, 0]
    for t in range(1, draws):
        w[:, t] = coefficient * w[:, t - 1] + np.sqrt(1 - coefficient**2) * kicks[:, t]
    return w + start * np.arange(CHAINS)[:, None]


def comoments(seed, phi, w, *, signal=1.0):
    """Chains whose observable is phi and whose losses go with w."""
    noise = np.random.default_rng([seed, 1]).normal(size=(*w.shape, PROBES))
    chains = []
    for chain in range(len(w)):
        chains.append(CoMoments.empty(chain, w.shape[1], 1, PROBES))
        chains[-1].update(phi[chain, :, None], signal * w[chain, :, None] * np.linspace(-1, 2, PROBES) + noise[chain])
    return chains


def said(function, *arguments, **options):
    """What is warned of; one warning at most."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arguments, **options)
    assert all(one.category is ChainWarning and one.filename == __file__ for one in caught) and len(caught) < 2
    return str(caught[0].message) if caught else ""


@pytest.mark.parametrize("coefficient", [0.0, 0.6])
def test_chains_that_mix_are_seldom_warned_of(coefficient):
    alarms = 0
    for seed in range(100):
        w = walks(seed, coefficient)
        found = said(pd.susceptibility, comoments(seed, w, w)), said(pd.llc, w**2, 3.0)
        alarms += any(found)
    assert alarms <= 4  # of 100


def test_chains_as_slow_as_they_are_long_are_warned_of():
    for seed in range(20):
        w = walks(seed, 0.99)  # 2.4 effective draws a chain
        chains = comoments(seed, w, w)
        text = said(pd.susceptibility, chains)
        assert text.startswith("susceptibility: ") and "chains 0, 1, 2, 3" in text and "expected less than" in text
        assert "R-hat of observable 0" in text or "observable 0 is slower than a batch of draws" in text
        text = said(pd.llc, w**2, inverse_temperature=3.0, burn_in=10)
        assert text.startswith("llc: ") and "effective draws of the losses, expected 100 or more; raise" in text
        assert said(pd.free_energy_response, chains, np.zeros(PROBES)).startswith("free_energy_response: ")


def test_each_finding_has_its_own_cause():
    fast, slow = walks(0, 0.0), walks(1, 0.99)
    apart = said(pd.susceptibility, comoments(0, (w := walks(0, 0.0, start=0.5)), w))
    assert "R-hat of observable 0" in apart and "slower" not in apart
    behind = said(pd.susceptibility, comoments(0, fast + 0.0 * slow, slow + fast))
    assert "the mean loss is slower" in behind and "observable 0 is slower" not in behind
    short = said(pd.susceptibility, comoments(0, w := walks(0, 0.0, draws=16), w))
    assert "as few as 64 effective draws of observable 0, expected 100 or more" in short


def test_weights_from_rows_that_are_noise():
    wanted = dict(target=[-0.1], inverse_temperature=100.0)
    w = walks(3, 0.0)
    right = pd.susceptibility(comoments(3, w, w))
    assert said(pd.solve_weights, right, **wanted) == ""
    np.testing.assert_array_equal(
        pd.solve_weights(right, **wanted).weights, pd.solve_weights(right.chi, **wanted).weights
    )
    warned = 0
    for seed in range(20):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            noise = pd.susceptibility(comoments(seed, walks(seed, 0.0), walks(100 + seed, 0.0), signal=0.0))
        text = said(pd.solve_weights, noise, **wanted)
        share = said(pd.solve_for_effective_sample_share, noise, share=0.9, **wanted)
        assert text.partition(": ")[2] == share.partition(": ")[2]
        warned += "chi of observable 0 is noise: its split-half reliability is" in text
    assert warned >= 12  # by chance its reliability is above .1 now and then


def test_a_run_does_not_warn_a_second_time():
    """Stages call the functions where they are written; these say nothing, since the page does."""
    from patterning_dist.response import llc as llcs
    from patterning_dist.response import susceptibility as susceptibilities

    w = walks(0, 0.99)
    assert said(susceptibilities.susceptibility, comoments(0, w, w)) == said(llcs.llc, w**2, 3.0) == ""


def test_what_is_constant_or_short_is_no_finding_of_slowness():
    still = comoments(0, np.zeros((CHAINS, DRAWS)), walks(0, 0.0))
    assert said(pd.susceptibility, still) == ""
    two = CoMoments.empty(0, 2, 1, 3, num_batches=2)
    two.update([[0.0], [1.0]], np.eye(3)[:2])
    assert "as few as 2 effective draws" in said(pd.susceptibility, [two])
