"""Ratios, shares of an effect and hazard ratios have intervals that cover as often as they say; p is uniform.

2,000 data sets each: a share of 95 % has the standard error .0049, and four of them are allowed.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import stdtrit

from patterning_dist.response.paired import mean_interval, share_of_effect
from patterning_dist.response.survival import Runs, hazard_ratio, log_rank

NUM = 2000


def allowed(share: float) -> float:
    return 4 * float(np.sqrt(share * (1 - share) / NUM))


@pytest.mark.parametrize("num_seeds", [3, 8])
def test_a_geometric_mean_of_ratios_is_covered(num_seeds: int) -> None:
    """Scores that grow by factors, with a common part of every seed that pairing takes out."""
    rng = np.random.default_rng(num_seeds)
    common = np.exp(2 * rng.standard_normal((NUM, num_seeds)))
    ours, theirs = (common * factor * np.exp(0.7 * rng.standard_normal(common.shape)) for factor in (5.0, 1.0))
    ends = np.exp([mean_interval(logs) for logs in np.log(ours / theirs)])
    assert np.mean((ends[:, 0] < 5) & (ends[:, 1] > 5)) == pytest.approx(0.95, abs=allowed(0.95))


@pytest.mark.parametrize("num_seeds", [3, 8])
@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_a_share_of_an_effect_is_covered(num_seeds: int, correlation: float) -> None:
    """The reference is 20 standard errors for 3 seeds: its interval holds 0 in next to none of the data sets."""
    rng = np.random.default_rng(num_seeds)
    noise = rng.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], (NUM, num_seeds))
    effects, reference = 0.6 * 12 + noise[..., 0], 12 + noise[..., 1]
    ends = [share_of_effect(*pair)[1] for pair in zip(effects, reference, strict=True)]
    found = np.array([pair for pair in ends if pair is not None])
    assert len(found) > 0.995 * NUM
    covered = np.mean((found[:, 0] < 0.6) & (found[:, 1] > 0.6))
    assert covered == pytest.approx(0.95, abs=allowed(0.95) + (1 - len(found) / NUM))


def test_an_arithmetic_mean_would_be_of_the_fastest_seed() -> None:
    """Why there are ratios: of growth by factors, the t interval of a difference misses its mean far too often."""
    rng = np.random.default_rng(0)
    values = np.exp(1.5 * rng.standard_normal((NUM, 4)))
    width = stdtrit(3, 0.975) * values.std(axis=1, ddof=1) / 2
    assert np.mean(np.abs(values.mean(axis=1) - np.exp(1.5**2 / 2)) < width) < 0.8


def censored(rng: np.random.Generator, rate: float, num: int) -> Runs:
    """Evaluated ten times until the time 1.5: events have the time of the next evaluation, and so there are ties."""
    times = np.ceil(rng.exponential(1 / rate, num) / 0.15) * 0.15
    return Runs(np.minimum(times, 1.5), times <= 1.5 + 1e-9)


def test_a_hazard_ratio_is_covered_and_the_test_has_its_size() -> None:
    """Eight runs an arm that are looked at ten times; both laws are of many runs, and a point off is allowed."""
    rng = np.random.default_rng(5)
    pairs = [(censored(rng, 2.0, 8), censored(rng, 2.0, 8)) for _ in range(NUM)]
    ends = np.array([hazard_ratio(*pair).interval for pair in pairs])
    covered = np.mean((ends[:, 0] < 1) & (ends[:, 1] > 1))
    small = np.mean([log_rank(*pair).p < 0.05 for pair in pairs])
    assert covered == pytest.approx(0.95, abs=allowed(0.95) + 0.01)
    assert small == pytest.approx(0.05, abs=allowed(0.05) + 0.01)


def test_p_is_uniform_over_permutations_of_the_arms() -> None:
    rng = np.random.default_rng(1)
    joined = Runs(*map(np.concatenate, zip(censored(rng, 2.0, 20), censored(rng, 1.0, 20), strict=True)))
    found = []
    for _ in range(NUM):
        order = rng.permutation(40)
        halves = (Runs(joined.times[part], joined.happened[part]) for part in (order[:20], order[20:]))
        found.append(log_rank(*halves).p)
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        # Ties make p discrete, by about a point at these sizes.
        assert np.mean(np.array(found) <= level) == pytest.approx(level, abs=allowed(level) + 0.01)
