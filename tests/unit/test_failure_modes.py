"""Every failure mode is found in traces made to have it, no other is found there, and healthy traces show none."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import chi2

from patterning_dist.errors import PatterningError
from patterning_dist.response.failure_modes import failure_modes

CHAINS, DRAWS, REPETITIONS = 4, 200, 200
INVERSE_TEMPERATURE, COORDINATES = 30.0, 1000
TIME = np.arange(DRAWS)


def noise(rng, num_chains=CHAINS, num_draws=DRAWS, autocorrelation=0.5):
    """Stationary AR(1), variance 1. [chain, draw]"""
    values = rng.normal(size=(num_chains, num_draws))
    values[:, 1:] *= np.sqrt(1 - autocorrelation**2)
    return lfilter([1.0], [1.0, -autocorrelation], values, axis=1)


def found(losses, **more):
    return failure_modes(losses, inverse_temperature=INVERSE_TEMPERATURE, num_coordinates=COORDINATES, **more)


def only(findings):
    assert len(findings) == 1
    return findings[0]


def modes(make, repetitions=REPETITIONS, seed=0):
    """How often each set of modes is found in `make(rng)`."""
    rng = np.random.default_rng(seed)
    return Counter(tuple(sorted({finding.mode for finding in found(make(rng))})) for _ in range(repetitions))


@pytest.mark.parametrize(
    ("num_chains", "num_draws", "autocorrelation"),
    [
        (1, 50, 0.5),
        (1, 200, 0.9),
        (2, 20, 0.0),
        (2, 200, 0.5),
        (4, 50, 0.0),
        (4, 200, 0.5),
        (4, 1000, 0.9),
    ],
)
def test_healthy_chains_show_nothing(num_chains, num_draws, autocorrelation):
    def normal(rng):
        return 1.0 + 0.2 * noise(rng, num_chains, num_draws, autocorrelation)

    # n_beta (L - L(w*)) of a regular direction or two is as skewed as a loss gets: Gamma with shape 1/2.
    def skewed(rng):
        return 0.05 * noise(rng, num_chains, num_draws, autocorrelation) ** 2

    assert modes(normal)[()] >= 0.95 * REPETITIONS
    assert modes(skewed)[()] >= 0.95 * REPETITIONS


def rising(rng):
    return 1 - np.exp(-(TIME + 1) / (DRAWS / 2)) + 0.05 * noise(rng)


def falling(rng):
    return 2 - rising(rng)


def one_spike(rng):
    trace = 1 + 0.1 * noise(rng)
    trace[1, 130] += 4
    return trace


def one_chain_elsewhere(rng):
    return 1 + 0.1 * noise(rng) + 5.0 * (np.arange(CHAINS) == 2)[:, None]


def disagreeing(rng):
    return 1 + 0.1 * noise(rng) + np.array([0.0, 0.1, 0.2, 0.3])[:, None]


def wandering(rng):
    """Chains that never come back: no common drift, but no common mean."""
    return 5 + np.cumsum(rng.normal(size=(CHAINS, DRAWS)), axis=1) / np.sqrt(DRAWS) * 0.5


def below(rng):
    return -0.02 + 0.05 * noise(rng)


def still(rng):
    return 1e-4 * (1 + 0.3 * noise(rng))


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        (rising, "still_rising"),
        (falling, "still_falling"),
        (one_spike, "spikes"),
        (one_chain_elsewhere, "spikes"),
        (disagreeing, "chains_disagree"),
        (wandering, "chains_disagree"),
        (below, "below_checkpoint"),
        (still, "too_little_signal"),
    ],
)
def test_each_mode_is_found_and_no_other(make, mode):
    assert modes(make, repetitions=60)[(mode,)] >= 0.95 * 60


@pytest.mark.parametrize("num_chains", [1, 2])
def test_a_drift_is_seen_in_few_chains(num_chains):
    found_in = modes(lambda rng: rising(rng)[:num_chains])
    assert sum(count for names, count in found_in.items() if "still_rising" in names) >= 0.9 * REPETITIONS


def test_a_drift_that_does_not_matter_is_none():
    # Each is significant by far: half a standard deviation and 5 % of the mean; then 2.5 of one, or 25 % of the other.
    shape, rng = np.arange(1000) / 1000 - 0.5, np.random.default_rng(1)
    trace = 1 + 0.05 * shape + 0.1 * noise(rng, num_draws=1000, autocorrelation=0.0)
    assert found(trace) == []
    assert only(found(trace + 0.2 * shape)).mode == "still_rising"
    assert only(found(trace - 0.8)).mode == "still_rising"


def test_messages_say_what_was_seen_and_which_knob_to_turn():
    rng = np.random.default_rng(2)
    numbers = (10, 11, 12, 13)
    drift = only(found(rising(rng), chains=numbers))
    assert drift.message.startswith("the loss still rises, by 0.8")
    assert drift.message.endswith("raise sampling.burn_in")
    assert drift.chains == numbers
    assert drift.evidence["rise"] == pytest.approx(0.85, abs=0.1)
    spike = only(found(one_spike(rng), chains=numbers))
    assert spike.chains == (11,)
    assert "1 draw(s) of chain 11 lie far above the rest (draw 130 of chain 11: " in spike.message
    assert spike.message.endswith("lower sampling.step_size or raise sampling.localization")
    elsewhere = only(found(one_chain_elsewhere(rng), chains=numbers))
    assert elsewhere.chains == (12,)
    assert "the loss of chain 12 lies up to 5" in elsewhere.message
    assert elsewhere.evidence == pytest.approx({"largest_rise": 6, "median_rise": 1}, rel=0.1)
    disagree = only(found(disagreeing(rng), chains=numbers))
    assert "R-hat of loss is " in disagree.message
    assert disagree.message.endswith("raise sampling.burn_in or sampling.steps_between_draws")
    assert disagree.evidence["rhat_loss"] > 1.1
    lower = only(found(below(rng)))
    assert "nats below that of the checkpoint, which is no minimum; train or anneal it further" in lower.message
    assert lower.evidence["rise"] == pytest.approx(-0.02, abs=0.01)
    little = only(found(still(rng)))
    assert "n_beta (E[L] - L(w*)) is 0.0031, of at most 500 for 1000 coordinates" in little.message
    assert little.message.endswith("lower sampling.localization or raise sampling.step_size")


def test_what_is_known_besides_the_traces():
    trace = 1 + 0.2 * noise(np.random.default_rng(3))
    assert found(trace, rhat={"gap": 1.04, "fixed": np.nan}, reliability={"gap": 0.4, "fixed": np.nan}) == []
    disagree = only(found(trace, rhat={"gap": 1.2}))
    assert (disagree.mode, disagree.evidence) == ("chains_disagree", {"rhat_gap": 1.2})
    assert "R-hat of gap is 1.2, expected less than 1.05" in disagree.message
    noisy = only(found(trace, reliability={"gap": -0.02, "loss": 0.6}))
    assert (noisy.mode, noisy.evidence) == ("too_little_signal", {"reliability_gap": -0.02})
    assert "chi of gap (-0.02) is noise" in noisy.message
    assert "raise sampling.num_draws or sampling.num_chains" in noisy.message
    lost = only(found(trace[:3], chains=(0, 1, 3), excluded={2: "the loss became nan at step 7"}))
    assert (lost.mode, lost.chains) == ("diverged", (2,))
    assert "chain 2: the loss became nan at step 7; if their losses blew up, lower sampling.step_size" in lost.message
    assert only(found([], excluded={0: "lost"})).mode == "diverged"


def test_hot_and_cold_chains():
    """The LLC of the trace is 30 +- .3; a temperature is told from 1 by a tenth, a bias of the LLC by a twentieth."""
    rng = np.random.default_rng(5)
    trace = 1 + 0.2 * noise(rng)
    scatter = 0.05 * rng.normal(size=(CHAINS, 32))
    for level in (0.97, 1.0, 1.08):
        assert found(trace, temperatures=level + scatter, step_biases=1.2 * (1 + scatter)) == []
    hot = only(found(trace, temperatures=1.2 + scatter, chains=(3, 5, 6, 8)))
    assert (hot.mode, hot.chains) == ("too_hot", (3, 5, 6, 8))
    assert hot.message.startswith("steps and minibatches heat the chains (virial temperature 1.2 +- 0.00")
    advice = "lower sampling.step_size, raise sampling.batch_size or set sampling.gradient: control_variate"
    assert hot.message.endswith(f", 1 for the posterior); {advice}")
    assert hot.evidence["temperature"] == pytest.approx(1.2, abs=0.02)
    stiff = only(found(trace, temperatures=1.01 + scatter, step_biases=5 * (1 + scatter)))
    assert "which makes the LLC (29.9) too large by up to 5; lower sampling.step_size" in stiff.message
    assert found(trace, temperatures=1.01 + scatter, step_biases=5 + 400 * scatter) == []  # 5 nats by chance
    inside = only(found(trace, temperatures=1 + scatter, stiff_temperatures=1.3 + scatter))
    assert inside.mode == "too_hot" and inside.evidence["temperature_stiff"] == pytest.approx(1.3, rel=0.02)
    assert "1.3 +- 0.0" in inside.message and "in its stiffest directions); lower sampling.step_size" in inside.message
    assert found(trace, temperatures=1 + scatter, stiff_temperatures=1.05 + scatter) == []
    cold = only(found(trace, temperatures=0.6 + scatter))
    assert cold.mode == "too_cold" and cold.message.endswith("raise sampling.burn_in")
    assert found(trace, temperatures=np.full((CHAINS, 3), 7.0)) == []


def test_directions_that_are_too_stiff_or_curve_downwards():
    trace = 1 + 0.2 * noise(np.random.default_rng(6))
    assert found(trace, precisions=(2.0, 3000.0), step_size=1e-4) == []
    assert found(trace, precisions=(2.0, 30000.0)) == []  # of a sampler whose coordinates have steps of their own
    stiff = only(found(trace, precisions=(2.0, 8000.0), step_size=1e-4))
    assert stiff.mode == "too_stiff"
    assert "its variance is 1.2 times the posterior's; lower sampling.step_size to 2.5e-05" in stiff.message
    assert "its variance is without bound" in only(found(trace, precisions=(2, 5e4), step_size=1e-4)).message
    saddle = only(found(trace, precisions=(-180.0, 3000.0), step_size=1e-4))
    assert (saddle.mode, saddle.evidence) == ("negative_curvature", {"precision": -180.0})
    assert "(n_beta H + gamma has an eigenvalue of -180) and is no Gaussian there" in saddle.message
    assert "raise sampling.localization by more than 1.8e+02" in saddle.message


def test_few_draws_scatter_and_r_hat_allows_for_it():
    # R-hat of 20 independent draws: n (R^2 - 1) + 1 is F with 2 chains - 1 degrees of freedom, n = 10.
    rng = np.random.default_rng(4)
    allowed = np.sqrt(1 + (chi2.isf(1e-3, 7) / 7 - 1) / 10)
    assert 1.1 < allowed < 1.13
    trace = 1 + 0.2 * noise(rng, num_draws=20, autocorrelation=0.0)
    assert found(trace, rhat={"gap": allowed - 0.01}) == []
    assert only(found(trace, rhat={"gap": allowed + 0.01})).mode == "chains_disagree"


def test_constant_and_bad_traces():
    assert only(found(np.zeros((2, 20)))).mode == "too_little_signal"
    assert found(np.ones((2, 20))) == []
    stuck = only(found(np.ones((2, 20)) + np.array([[0.0], [1.0]])))
    assert (stuck.mode, stuck.evidence) == ("chains_disagree", {"rhat_loss": np.inf})
    with pytest.raises(PatterningError, match="losses: row 0, draw 2 is nan; leave that chain out"):
        found([[0.0, 1.0, np.nan, 2.0]])
    with pytest.raises(PatterningError, match=r"losses: trace of shape \(1, 2\), expected \[chain, draw\]"):
        found([[0.0, 1.0]])
