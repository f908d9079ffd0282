"""Calibration on chains whose answers are known: AR(1) draws, and SGLD on a quadratic loss simulated in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from patterning_dist.response.calibration import Assessment, Setting, Trial, assess, burn_in_of
from patterning_dist.response.llc import TraceMean
from patterning_dist.response.proposal import next_trials, precisions, propose, search, spacing
from patterning_dist.response.ranking import rank
from patterning_dist.response.run_length import (
    STEP_BIAS,
    TOO_COLD,
    Draws,
    RunPlan,
    best_thinning,
    covariance_inflation,
    draws_needed,
    judge_bias,
    plan_run,
    signal,
)
from patterning_dist.response.usable import DIVERGED, TOO_SLOW

SETTING = Setting(1e-3, 30.0, 4.0)
NUM_LATENT, NUM_SAMPLES = 6, 40


def autoregressive(rng: np.random.Generator, shape: tuple[int, ...], correlation: float) -> np.ndarray:
    """Stationary AR(1) along the second axis, N(0, 1) at every draw."""
    draws = rng.standard_normal(shape)
    for t in range(1, shape[1]):
        draws[:, t] = correlation * draws[:, t - 1] + math.sqrt(1 - correlation**2) * draws[:, t]
    return draws


class Toy:
    """phi and l_i linear in a few latent coordinates, l_i with a square as well: chi_i = -a . (b_i - mean b)."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.weights = rng.standard_normal(NUM_LATENT)
        self.linear, self.square = rng.standard_normal((2, NUM_SAMPLES, NUM_LATENT))
        self.chi = -(self.linear - self.linear.mean(axis=0)) @ self.weights
        self.spread = self.chi.std()

    def draw(
        self, rng: np.random.Generator, num_chains: int, num_draws: int, correlation: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """phi [chain, draw] and losses [chain, draw, sample]."""
        latent = autoregressive(rng, (num_chains, num_draws, NUM_LATENT), correlation)
        return latent @ self.weights, latent @ self.linear.T + latent**2 @ self.square.T / 2

    def susceptibility(
        self, rng: np.random.Generator, num_chains: int, num_draws: int, correlation: float, thinning: int = 1
    ) -> np.ndarray:
        """chi of every chain [chain, sample]."""
        phi, losses = (part[:, ::thinning] for part in self.draw(rng, num_chains, num_draws * thinning, correlation))
        excess = losses - losses.mean(axis=-1, keepdims=True)
        phi = phi - phi.mean(axis=1, keepdims=True)
        return -np.einsum("ct,ctm->cm", phi, excess) / (num_draws - 1)


def trials(mean_loss: np.ndarray, phi: np.ndarray | None = None, losses: np.ndarray | None = None) -> list[Trial]:
    """One trial a chain, a millisecond a step and two a draw."""
    phi = mean_loss if phi is None else phi
    losses = np.zeros((*mean_loss.shape, 2)) if losses is None else losses
    return [
        Trial(mean_loss[c], phi[c, :, None], losses[c], num_coordinates=NUM_LATENT, step_seconds=1e-3,
              draw_seconds=2e-3)
        for c in range(len(mean_loss))
    ]  # fmt: skip


def level(rng: np.random.Generator, num_chains: int, num_draws: int, correlation: float, rise: float = 0.0):
    """Loss rises 3 +- 0.3 nats to its plateau in about ``rise`` draws."""
    plateau = 3 + 0.3 * autoregressive(rng, (num_chains, num_draws), correlation)
    return plateau * (1 - np.exp(-np.arange(num_draws) / rise)) if rise else plateau


CURVATURE = (-0.5, 20.0)


def test_step_sizes_come_from_the_stiffness_and_a_posterior_that_is_no_gaussian_is_mended() -> None:
    found = propose(CURVATURE, [30.0], [40.0, 5.0], None, standard_error=0.1, is_raised=False)
    # 30 * 20 + 40; 0.1 of it, since chi is wanted to 0.1 of its spread.
    assert found.settings == [Setting(7.81e-05, 30.0, 40.0), Setting(1.56e-4, 30.0, 40.0)]
    assert list(found.refused) == ["inverse_temperature 30, localization 5"]
    assert "has an eigenvalue of -10 at the checkpoint" in found.refused["inverse_temperature 30, localization 5"]
    assert "localization 30 mends it" in found.refused["inverse_temperature 30, localization 5"]
    raised = propose(CURVATURE, [30.0], [5.0], None, standard_error=0.5, is_raised=True)
    assert raised.settings == [Setting(1.59e-4, 30.0, 30.0), Setting(3.17e-4, 30.0, 30.0)], "0.2 / 630 at most"
    assert precisions(CURVATURE, 30.0, 30.0) == (15.0, 630.0)
    scaled = propose(CURVATURE, [30.0], [40.0], None, standard_error=0.1, largest_scale=10.0, is_raised=True)
    assert [s.step_size for s in scaled.settings] == [7.81e-06, 1.56e-5]
    # A smallest eigenvalue that rounding may have made.
    flat = propose((-1e-5, 20.0), [30.0], [1e-9], [1e-4], standard_error=0.1, is_raised=False)
    assert flat.settings == [Setting(1e-4, 30.0, 1e-9)] and not flat.refused


def test_step_sizes_that_are_given_are_tried_but_for_those_that_must_diverge() -> None:
    found = propose(CURVATURE, [30.0, 3.0], [40.0], [1e-2, 1e-3], standard_error=0.1, is_raised=True)
    assert found.settings == [Setting(1e-3, 3.0, 40.0), Setting(1e-2, 3.0, 40.0), Setting(1e-3, 30.0, 40.0)]
    assert list(found.refused) == ["inverse_temperature 30, localization 40, step_size 0.01"]
    (reason,) = found.refused.values()
    assert reason == "step_size times the largest precision, 640, is 4 or more, which must diverge; 0.00016 is good"


def test_a_trial_is_as_long_as_its_softest_direction_needs_or_forty_steps_a_draw() -> None:
    # 2 / (eps P) steps: P is 25 of 40 - 30 * 0.5, or half the localization where it is nearly gone.
    assert spacing(Setting(1e-2, 30.0, 40.0), CURVATURE, 10) == 4 * math.ceil(2 / (1e-2 * 25) / 10)
    assert spacing(Setting(1e-2, 30.0, 15.1), CURVATURE, 20) == math.ceil(4 * 2 / (1e-2 * 7.55) / 20)
    assert spacing(Setting(1e-4, 30.0, 40.0), CURVATURE, 10) == 40


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_burn_in_ends_where_the_loss_is_within_noise_of_its_plateau(correlation: float) -> None:
    rng = np.random.default_rng(1)
    found = [burn_in_of(level(rng, 4, 200, correlation, rise=15.0)) for _ in range(50)]
    # Within max(sd, 5 %) of the plateau: after log(1 / 0.05) = 3 time constants, at the least, give or take noise.
    assert 15 < np.median(found) < 60
    kept = [level(rng, 4, 200, correlation, rise=15.0)[:, start:].mean() for start in found]
    assert np.mean(kept) == pytest.approx(3, rel=0.03)


def test_no_burn_in_is_left_out_of_a_level_trace_and_never_more_than_half() -> None:
    rng = np.random.default_rng(2)
    assert np.median([burn_in_of(level(rng, 4, 60, 0.9)) for _ in range(50)]) <= 2
    assert burn_in_of(np.tile(np.arange(60.0), (4, 1))) == 30


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8])
def test_effective_draws_and_their_rate_are_those_of_the_autoregression(correlation: float) -> None:
    rng = np.random.default_rng(3)
    found = assess(SETTING, trials(level(rng, 4, 2000, correlation)), ["loss"], steps_between_draws=5)
    assert found.failure == ""
    expected = 4 * found.num_draws * (1 - correlation) / (1 + correlation)
    # The estimate scatters by about sqrt(8 tau / N): 10 % at the largest tau here.
    assert found.effective_draws == pytest.approx(expected, rel=0.3)
    seconds = 4 * found.num_draws * (5 * 1e-3 + 2e-3)
    assert found.usable_per_second == pytest.approx(found.effective_draws / seconds)
    assert found.slowest == "loss"
    assert found.llc.value == pytest.approx(30 * 3, abs=4.5 * found.llc.standard_error)
    assert found.loss_rise == pytest.approx(3, rel=0.05)


def test_a_chain_that_failed_makes_the_setting_diverged_whatever_the_others_did() -> None:
    good = trials(level(np.random.default_rng(4), 3, 40, 0.3))
    torn = Trial(
        np.array([0.0, 9.0]), np.zeros((2, 1)), np.zeros((2, 2)), NUM_LATENT, 1e-3, 2e-3, failure="the loss became nan"
    )
    found = assess(SETTING, [*good, torn], ["loss"], 1)
    assert found.failure == DIVERGED
    assert found.reason == "1 of 4 chains: the loss became nan"
    assert found.usable_per_second == 0
    assert np.isnan(found.effective_draws) and np.isnan(found.loss_rise)


def test_failure_modes_make_a_setting_unusable_and_say_which_knob_to_turn() -> None:
    rng = np.random.default_rng(5)
    healthy = level(rng, 4, 80, 0.3)
    rising = healthy * np.linspace(0, 1, 80)
    apart = healthy + np.array([0.0, 1.0, 2.0, 3.0])[:, None]
    spiked = healthy.copy()
    spiked[2, 60] = 300
    found = {
        name: assess(SETTING, trials(trace), ["loss"], 1)
        for name, trace in [("rising", rising), ("apart", apart), ("spiked", spiked), ("below", -healthy)]
    }
    assert {name: one.failure for name, one in found.items()} == {
        "rising": "still rising",
        "apart": "chains disagree",
        "spiked": "spikes",
        "below": "below checkpoint",
    }
    assert all(one.usable_per_second == 0 < one.effective_per_second for one in found.values())
    assert "raise calibration.num_draws or calibration.steps_between_draws" in found["rising"].reason
    assert "lower sampling.step_size" in found["spiked"].reason


def test_autocorrelation_alone_is_no_failure_but_too_much_of_it_is() -> None:
    """R-hat of 4 x 50 draws of an AR(.6) is above the usual limits more often than not, with nothing wrong."""
    rng = np.random.default_rng(14)
    found = [assess(SETTING, trials(level(rng, 4, 50, 0.6)), ["loss"], 1) for _ in range(40)]
    assert np.mean([one.rhat > 1.05 for one in found]) > 0.5
    assert np.mean([one.failure != "" for one in found]) <= 0.1
    slow = [assess(SETTING, trials(level(rng, 4, 50, 0.97)), ["loss"], 1) for _ in range(40)]
    assert np.mean([one.usable_per_second == 0 for one in slow]) > 0.9
    reasons = [one.reason for one in slow if one.failure == TOO_SLOW]
    assert reasons and "effective draws of" in reasons[0] and "raise step_size" in reasons[0]


def test_an_observable_that_does_not_move_is_left_out_and_nothing_but_such_is_unusable() -> None:
    rng = np.random.default_rng(6)
    loss = level(rng, 4, 60, 0.2)
    still = [
        Trial(t.mean_loss, np.column_stack([t.observables, np.zeros(60)]), t.losses, NUM_LATENT, 1e-3, 2e-3)
        for t in trials(loss)
    ]
    found = assess(SETTING, still, ["loss", "constant"], 1)
    assert found.failure == "" and found.slowest == "loss" and list(found.signals) == ["loss"]
    nothing = assess(SETTING, trials(loss, np.zeros_like(loss)), ["constant"], 1)
    assert nothing.failure == "nothing moves"


def test_signal_parts_the_spread_of_chi_from_its_noise() -> None:
    toy, rng = Toy(), np.random.default_rng(7)
    found = [signal(toy.susceptibility(rng, 4, 100, 0.5)) for _ in range(100)]
    spreads = np.array([one.spread for one in found])
    assert abs(np.mean(spreads**2) - toy.spread**2) < 4.5 * np.std(spreads**2) / 10
    realised = np.mean([np.mean((toy.susceptibility(rng, 1, 100, 0.5)[0] - toy.chi) ** 2) for _ in range(400)])
    assert np.median([one.ratio for one in found]) == pytest.approx(realised / toy.spread**2, rel=0.15)
    # The spread between the chains alone must not be too sure: 4 chains, one noise figure.
    truth = realised / toy.spread**2
    assert np.mean([one.low < truth < one.high for one in found]) > 0.85


def test_signal_of_noise_alone_promises_nothing() -> None:
    rng = np.random.default_rng(8)
    chi = rng.standard_normal((4, 300))
    chi -= chi.mean(axis=0)  # no two halves agree
    found = signal(chi)
    assert math.isnan(found.spread) and math.isnan(found.ratio)
    assert (found.low, found.high) == (0, math.inf)
    pair = signal(Toy().chi + 0.1 * rng.standard_normal((2, NUM_SAMPLES)))
    assert pair.ratio > 0 and (pair.low, pair.high) == (0, math.inf), "two chains cannot tell their own spread"


@pytest.mark.parametrize(("num_chains", "num_draws", "correlation", "wanted"), [(4, 100, 0.5, 0.15), (8, 60, 0.8, 0.2)])
def test_a_run_of_the_foretold_length_has_the_wanted_error(
    num_chains: int, num_draws: int, correlation: float, wanted: float
) -> None:
    toy, rng = Toy(1), np.random.default_rng(9)
    found = [
        draws_needed(signal(toy.susceptibility(rng, num_chains, num_draws, correlation)), num_draws, wanted).value
        for _ in range(60)
    ]
    length = int(np.median(found) / 4)
    squares = [
        np.mean((toy.susceptibility(rng, 4, length, correlation).mean(axis=0) - toy.chi) ** 2) for _ in range(60)
    ]
    assert math.sqrt(np.mean(squares)) / toy.spread == pytest.approx(wanted, rel=0.2)


def test_a_planned_run_reaches_the_wanted_error_with_the_draws_and_the_thinning_of_the_plan() -> None:
    toy, rng, wanted = Toy(2), np.random.default_rng(10), 0.15
    phi, losses = toy.draw(rng, 8, 400, 0.9)
    # Measuring costs as much as twenty steps: draws that are nearly copies are not worth it.
    chains = [
        Trial(phi[c] + 3, phi[c, :, None], losses[c], NUM_LATENT, step_seconds=1e-3, draw_seconds=20e-3)
        for c in range(8)
    ]
    found = assess(SETTING, chains, ["phi"], steps_between_draws=1)
    plan = plan_run(found, standard_error=wanted, num_chains=4, min_draws=16, num_subjects=3, num_workers=2)
    assert plan.slowest == "phi" and plan.num_chains == 4
    assert 4 <= plan.steps_between_draws <= 20
    assert plan.needed["phi"].low < plan.needed["phi"].value < plan.needed["phi"].high
    assert plan.num_draws == math.ceil(plan.needed["phi"].value / 4)
    # Five times the autocorrelation time of 19 draws, which the trial knows to 20 % or so.
    assert plan.burn_in == pytest.approx(95, rel=0.6)
    # Six rounds of two chains each.
    one = plan.burn_in * 1e-3 + plan.needed["phi"].value / 4 * (plan.steps_between_draws * 1e-3 + 20e-3)
    assert plan.seconds.value == pytest.approx(6 * one)
    assert plan.seconds.low < plan.seconds.value < plan.seconds.high
    squares = [
        np.mean((toy.susceptibility(rng, 4, plan.num_draws, 0.9, plan.steps_between_draws).mean(axis=0) - toy.chi) ** 2)
        for _ in range(40)
    ]
    # One plan from one trial: its own scatter, about 15 % of the error, comes on top.
    assert math.sqrt(np.mean(squares)) / toy.spread == pytest.approx(wanted, rel=0.35)


def test_a_plan_from_noise_says_that_it_knows_nothing() -> None:
    rng = np.random.default_rng(11)
    losses = rng.standard_normal((4, 60, 400))
    found = assess(SETTING, trials(level(rng, 4, 60, 0.2), losses=losses), ["phi"], 1)
    assert math.isnan(found.signals["phi"].ratio) and abs(found.reliability) < 0.2
    plan = plan_run(found, standard_error=0.1, num_chains=4, min_draws=16, num_subjects=1, num_workers=1)
    assert plan.slowest == "" and plan.num_draws == 16 and math.isnan(plan.seconds.value)


def test_thinning_weighs_the_cost_of_a_measurement_against_that_of_the_steps() -> None:
    assert best_thinning(1.0, 1.0, 100.0, most=50) == 1, "independent draws"
    assert best_thinning(39.0, 1.0, 0.0, most=50) == 1, "measurements that cost nothing"
    assert best_thinning(39.0, 1.0, 1000.0, most=500) > 20
    assert best_thinning(39.0, 1.0, 1000.0, most=7) == 7
    # An AR(1) of .5: the variance of a variance is (1 + .25) / (1 - .25) times that of independent draws.
    assert covariance_inflation(3.0, 1) == pytest.approx(5 / 3)


def gaussian_trials(setting: Setting, rng: np.random.Generator, num_draws: int, steps: int) -> list[Trial]:
    """SGLD with full gradients on L = |w|^2 / 2, d = 20, 4 chains; one beyond 50 prior radii has failed."""
    eps, n_beta, gamma = setting
    num_coordinates, precision = 20, n_beta + gamma
    slopes = np.random.default_rng(0).standard_normal((NUM_SAMPLES, num_coordinates))
    found = []
    for _ in range(4):
        w, draws, squares, failure = np.zeros(num_coordinates), [], [], ""
        for step in range((num_draws - 1) * steps + 1):
            if step % steps == 0:
                draws.append(w.copy())
            squares.append(w @ w)
            w = w - eps / 2 * precision * w + math.sqrt(eps) * rng.standard_normal(num_coordinates)
            if gamma * w @ w > 2500 * num_coordinates:
                failure = "the weights left the neighbourhood"
                break
        w = np.array(draws)
        loss = (w**2).sum(axis=1) / 2
        losses = loss[:, None] + w @ slopes.T
        level = np.array([part.mean() for part in np.array_split(squares, 32)]) if not failure else np.zeros(0)
        heat = {
            "temperatures": precision * level / num_coordinates,
            "step_biases": eps / 8 * n_beta * precision * level,
        }
        observables = np.column_stack([w[:, 0], loss])
        found.append(Trial(loss, observables, losses, num_coordinates, 1e-3, 1e-3, **heat, failure=failure))
    return found


def judged(setting: Setting, trials: list[Trial], steps: int) -> Assessment:
    """For chi to 0.5 of its spread; P = 30 + 20."""
    found = assess(setting, trials, ["w", "loss"], steps)
    plan = {"standard_error": 0.5, "num_chains": 4, "min_draws": 16, "num_subjects": 1, "num_workers": 1}
    return found if found.failure else judge_bias(found, plan_run(found, **plan), 0.5, setting.step_size * 50)


def test_biased_and_diverged_steps_are_told_and_a_smaller_one_is_found() -> None:
    """Precision P = 50: AR(1) with 1 - eps P / 2 and variance 1 / (P (1 - eps P / 4)); eps P = 5 diverges."""
    rng = np.random.default_rng(12)
    lengths: dict[Setting, int] = {}

    def run(settings: Mapping[Setting, int]) -> dict[Setting, list[Trial]]:
        lengths.update(settings)
        return {s: gaussian_trials(s, rng, 100, steps) for s, steps in settings.items()}

    first = [Setting(eps, 30.0, 20.0) for eps in (4e-2, 1e-1)]
    ranked, trials = search(first, run, judged, lambda setting: round(0.2 / setting.step_size), is_fixed=False)
    assert set(trials) == set(lengths) == {one.setting for one in ranked}
    by_step = {one.setting.step_size: one for one in ranked}
    biased, best = by_step[4e-2], ranked[0]
    assert by_step[1e-1].failure == DIVERGED and ranked[-1].setting.step_size == 1e-1
    # eps P = 2: twice as wide, an LLC of 12 for 6, and chi four times as large.
    assert biased.failure == STEP_BIAS and biased.temperature.value == pytest.approx(2, rel=0.1)
    assert biased.step_bias.value == pytest.approx(6, rel=0.1)
    assert "lower step_size to" in biased.reason and biased.reason.endswith("control_variate")
    assert best.failure == "" and best.setting.step_size < 4e-2 and best.bias_ratio <= 1.01
    assert lengths[best.setting] == pytest.approx(0.2 / best.setting.step_size, rel=0.01)
    llc = 6 / (1 - 50 * best.setting.step_size / 4)
    assert abs(best.llc.value - llc) < 4 * best.llc.standard_error
    only, _ = search(first, run, judged, lambda setting: 5, is_fixed=True)
    assert {one.setting for one in only} == set(first), "nothing but what was asked for"


def test_the_bias_is_held_against_the_error_of_the_planned_answer() -> None:
    setting = Setting(4e-3, 30.0, 20.0)  # eps P = 0.2: the LLC is 5 % too large, 0.32 nats
    one = judged(setting, gaussian_trials(setting, np.random.default_rng(3), 200, 10), 10)
    assert one.step_bias.value == pytest.approx(6 * 0.05 / 0.95, rel=0.1)
    made = RunPlan(4, 100, 10, 5, {}, "", 0.5, Draws(1.0, 1.0, 1.0))
    fine = judge_bias(replace(one, failure=""), replace(made, llc_error=2.0), 0.5, 0.2)
    assert fine.failure == "" and fine.bias_ratio == pytest.approx(max(one.step_bias.value, 2 * 0.2))
    coarse = judge_bias(replace(one, failure=""), replace(made, llc_error=0.1), 0.5, 0.2)
    assert coarse.failure == STEP_BIAS and coarse.bias_ratio == pytest.approx(one.step_bias.value / 0.05)
    assert "and the planned run has a standard error of 0.1; lower step_size to" in coarse.reason
    smallest = judge_bias(replace(one, failure=""), replace(made, llc_error=1e-9), 0.5, 0.2)
    assert smallest.bias_ratio == pytest.approx(one.step_bias.value / (0.005 * one.llc.value))
    chi = judge_bias(replace(one, failure=""), replace(made, llc_error=100.0), 0.05, 0.2)
    assert chi.failure == STEP_BIAS and "chi of the stiffest directions is off by 10%, and 5% is" in chi.reason
    # A thermostat's bias is not measured: at most the excess of the temperature, of all of the LLC.
    cold = judge_bias(replace(one, temperature=TraceMean(0.8, 0.01, 20.0)), replace(made, llc_error=2.0), 0.5, 0.2)
    assert cold.failure == TOO_COLD and "raise calibration.steps_between_draws" in cold.reason
    unknown = replace(one, failure="", step_bias=TraceMean(math.nan, math.nan, math.nan))
    found = judge_bias(unknown, replace(made, llc_error=1.0), 1e9, 0.4)
    assert found.bias_ratio == pytest.approx(0.1 * one.llc.value / 0.5)


def test_the_error_of_the_planned_llc_is_that_of_such_runs() -> None:
    """AR(1) of 0.8, nine draws for one: 400 draws a chain are predicted from 100."""
    rng = np.random.default_rng(4)
    found = [assess(SETTING, trials(level(rng, 4, 100, 0.8)), ["loss"], 1) for _ in range(40)]
    plans = [
        plan_run(one, standard_error=0.1, num_chains=4, min_draws=400, num_subjects=1, num_workers=1) for one in found
    ]
    assert {plan.num_draws for plan in plans} == {400}
    thinning = int(np.median([plan.steps_between_draws for plan in plans]))
    means = [30 * level(rng, 4, 400 * thinning, 0.8)[:, ::thinning].mean() for _ in range(200)]
    assert np.median([plan.llc_error for plan in plans]) == pytest.approx(np.std(means), rel=0.2)


def test_trials_that_are_too_short_are_made_longer_and_only_where_nothing_is_usable() -> None:
    rng = np.random.default_rng(15)
    slow = assess(SETTING, trials(level(rng, 4, 50, 0.97)), ["loss"], 6)
    rising = replace(slow, failure="still rising")
    good = assess(SETTING._replace(step_size=5e-4), trials(level(rng, 4, 80, 0.3)), ["loss"], 2)
    assert next_trials({SETTING: (rising, 6)}, lambda setting: 9) == {SETTING: 24}
    assert next_trials({SETTING: (rising, 6), good.setting: (good, 2)}, lambda setting: 9) == {}
    elsewhere = Setting(1e-3, 30.0, 400.0)
    torn = replace(good, setting=elsewhere, failure=DIVERGED)
    found = next_trials({SETTING: (good, 6), elsewhere: (torn, 2)}, lambda setting: 9)
    assert found == {Setting(2.5e-4, 30.0, 400.0): 9}
    assert next_trials({elsewhere: (torn, 5)}, lambda setting: 9) == {Setting(2.5e-4, 30.0, 400.0): 20}


def test_posteriors_are_ranked_by_reliability_and_their_step_sizes_by_speed() -> None:
    toy = Toy()

    def made(setting: Setting, noise: float, correlation: float, failure: bool = False) -> object:
        rng = np.random.default_rng(int(1e6 * setting.step_size) + int(setting.localization))
        phi, losses = toy.draw(rng, 4, 200, correlation)
        losses = losses + noise * rng.standard_normal(losses.shape)
        loss = 3 + 0.1 * phi
        if failure:
            loss = loss * np.linspace(0, 1, 200)
        return assess(setting, trials(loss, phi, losses), ["phi"], 1)

    ranked = rank(
        [
            made(Setting(1e-3, 30.0, 4.0), 0.1, 0.5),
            made(Setting(1e-4, 30.0, 4.0), 0.1, 0.8),
            made(Setting(1e-3, 30.0, 40.0), 60.0, 0.0),
            made(Setting(1e-2, 30.0, 4.0), 0.1, 0.0, failure=True),
        ]
    )
    assert [(one.setting.localization, one.setting.step_size) for one in ranked] == [
        (4.0, 1e-3), (4.0, 1e-4), (40.0, 1e-3), (4.0, 1e-2)
    ]  # fmt: skip
    fast, slow, other, last = ranked
    assert fast.usable_per_second > slow.usable_per_second
    assert other.usable_per_second > fast.usable_per_second and other.reliability < fast.reliability
    assert last.failure == "still rising"
