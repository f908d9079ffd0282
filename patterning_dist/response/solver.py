"""From chi and a target response to sample weights rho = 1 + h within bounds.

chi is [observable, sample], as one array or as a list of column shards; dmu = (n_beta / n) chi h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq

from patterning_dist.errors import PatterningError
from patterning_dist.response.bounded import Problem, chunks, largest_step, minimise, row_covariance
from patterning_dist.response.grouped import GroupedProblem, pose_groups
from patterning_dist.response.intervention import Chi, Inverse, Method, check_inputs
from patterning_dist.response.moments import Floats

SLACK = 1e-6  # relative: a strength this far past the largest is rounding, and is brought back to it


@dataclass(frozen=True)
class WeightSolution:
    """Sample weights and what is predicted of them. Sums over samples; rho has mean 1."""

    weights: Floats  # sample
    strength: float
    largest_feasible_strength: float  # inf for ridge, which needs no strength to be met
    predicted_response: Floats  # observable: (n_beta / n) chi h
    effective_sample_size: float  # (sum rho)^2 / sum rho^2
    effective_sample_share: float
    top_percent_share: float  # of all weight, on the heaviest 1 % of samples
    num_at_minimum: int
    num_at_maximum: int
    num_iterations: int
    residual: float  # largest miss of a constraint, relative to the largest wanted response


@dataclass(frozen=True)
class _Posed:
    problem: Problem | GroupedProblem
    bounds: tuple[float, float]  # of rho; the maximum may be infinite, where problem.high never is
    beta: Floats  # dual: the constraint 1/n Q h = strength * beta
    inverse_temperature: float
    soft: bool

    @property
    def limits(self) -> str:
        """What holds a strength back, for messages."""
        words = f"weights in [{self.bounds[0]:g}, {self.bounds[1]:g}]"
        if isinstance(self.problem, GroupedProblem):
            words += f" that keep the mass of {self.problem.num_groups} groups"
        return words

    def largest_strength(self) -> tuple[float, float]:
        return (np.inf, np.inf) if self.soft else largest_step(self.problem, self.beta)

    def solve(self, strength: float) -> tuple[Floats, float, int]:
        """(dual point, residual, iterations)."""
        beta = strength * self.beta
        # beta is the solution without bounds.
        dual, gradient, iterations = minimise(self.problem, beta, beta, np.eye(len(beta)))
        return dual, float(np.abs(gradient - beta).max() / max(np.abs(beta).max(), 1e-300)), iterations


def solve_weights(
    chi: Chi,
    target: ArrayLike,
    *,
    inverse_temperature: float,
    strength: float = 1.0,
    weight_min: float = 0.0,
    weight_max: float = np.inf,
    method: Method = "minimum_norm",
    ridge: float | None = None,
    rank: int | None = None,
    mode: int | None = None,
    observables: Sequence[str] | None = None,
    groups: ArrayLike | None = None,
) -> WeightSolution:
    """min 1/2 |h|^2 s.t. (n_beta/n) chi h = strength * target, sum h = 0, weight_min <= 1 + h <= weight_max.

    After Wang & Murfet 2601.13548, with bounds; chi [observable, sample], target [observable] in its units.
    `truncated` and `mode` ask only for the response along the chosen left singular directions of centred chi.
    `ridge` minimises 1/2 |h|^2 + 1/(2 tau) |chi h - (n / n_beta) strength target|^2 within the bounds:
    without bounds it is the ridge inverse; its response falls short of the target, and no strength is
    infeasible. `groups`, whole numbers [sample]: sum h = 0 in every group of samples with the same number as
    well, so that its weights sum to what they do without an intervention (singular directions are then those of
    chi centred in every group). Raises PatterningError for a strength out of reach (naming the largest), a target
    that linearly dependent `observables` contradict, bounds that do not enclose 1, entries that are not finite,
    and groups within which chi does not vary.
    """
    inverse = Inverse(method, ridge, rank, mode)
    posed = _pose(chi, target, inverse, inverse_temperature, weight_min, weight_max, observables, groups)
    return _solution(posed, strength, posed.largest_strength())


def largest_feasible_strength(chi: Chi, target: ArrayLike, **options: Any) -> float:
    """max a such that a * target can be reached within the bounds; `options` as for `solve_weights` but
    strength.

    Reached by an actual h, and within 1e-7 (relative) of the linear programming bound.
    """
    return _pose_from_options(chi, target, options).largest_strength()[0]


def share_at_strength(share: float, strength: float) -> float:
    """Effective sample share of 1 + s h, 1 / (1 + s^2 (1 / share - 1)), where 1 + h of mean 1 has ``share``."""
    return 1 / (1 + strength**2 * (1 / share - 1))


def solve_for_effective_sample_share(chi: Chi, target: ArrayLike, share: float, **options: Any) -> WeightSolution:
    """The solution whose strength makes (sum rho)^2 / (n sum rho^2) = share; `options` as for
    `solve_weights`.

    |h| grows with the strength, so the share falls from 1 to that of the largest feasible strength. Raises
    PatterningError for a share outside (0, 1) or below what the bounds (or the ridge) allow, naming the
    smallest.
    """
    if not 0 < share < 1:
        raise PatterningError(f"effective sample share: got {share}, expected between 0 and 1 (1 is no intervention)")
    posed = _pose_from_options(chi, target, options)
    largest = posed.largest_strength()
    # Without bounds |h|^2 / n is exactly quadratic in the strength, so its root is nearly linear: few steps.
    wanted = np.sqrt(1 / share - 1)

    def excess(strength: float) -> float:
        dual, _, _ = posed.solve(strength)
        return float(np.sqrt(np.mean(posed.problem.intervention(dual) ** 2))) - wanted

    upper = largest[0]
    if posed.soft:
        upper = 1.0
        while excess(upper) < 0 and upper < 1e12:
            upper *= 4
    top = excess(upper)
    if top < 0:
        raise PatterningError(
            f"effective sample share: {share:g} is below {1 / (1 + (wanted + top) ** 2):.4g}, the smallest with "
            f"{posed.limits}; ask for a larger share or widen weight_min and weight_max"
        )
    strength = brentq(excess, 0.0, upper, xtol=1e-12 * upper, rtol=1e-10)
    return _solution(posed, strength, largest)


def _pose_from_options(chi: Chi, target: ArrayLike, options: dict) -> _Posed:
    options = {"weight_min": 0.0, "weight_max": np.inf, "observables": None, "groups": None, **options}
    inverse = {name: options.pop(name) for name in ("method", "ridge", "rank", "mode") if name in options}
    return _pose(chi, target, Inverse(**inverse), **options)


def _pose(
    chi: Chi,
    target: ArrayLike,
    inverse: Inverse,
    inverse_temperature: float,
    weight_min: float,
    weight_max: float,
    observables: Sequence[str] | None,
    groups: ArrayLike | None,
) -> _Posed:
    shards, target = check_inputs(chi, target, inverse_temperature)
    if not weight_min < 1 < weight_max:
        raise PatterningError(f"weight bounds: got [{weight_min}, {weight_max}], expected weight_min < 1 < weight_max")
    num_samples = sum(shard.shape[1] for shard in shards)
    if groups is None:
        means, covariance = row_covariance(shards)
    else:
        labels, means, covariance = pose_groups(shards, groups)
    directions, variances = inverse.directions(covariance, target, observables)
    turn = directions / np.sqrt(variances)[:, None]
    beta = turn @ target / inverse_temperature
    if not beta.any():
        raise PatterningError("target: asks for no response in the directions kept; give one that is not zero")
    penalty = np.zeros((len(beta), len(beta)))
    if inverse.ridge is not None:
        penalty = inverse.ridge / num_samples * (turn @ turn.T)
    low = weight_min - 1.0
    # With mean 1 no weight can pass this, so an infinite maximum needs no other treatment.
    high = min(weight_max - 1.0, -low * max(num_samples - 1, 1))
    problem: Problem | GroupedProblem
    if groups is None:  # one multiplier, for the sum, beside those of the directions
        beta, penalty = np.append(beta, 0.0), np.pad(penalty, (0, 1))
        problem = Problem(shards, means, turn, penalty, low, high)
    else:
        problem = GroupedProblem(shards, labels, means, turn, penalty, low, high, np.zeros(means.shape[1]))
    return _Posed(problem, (weight_min, weight_max), beta, inverse_temperature, soft=inverse.ridge is not None)


def _solution(posed: _Posed, strength: float, largest: tuple[float, float]) -> WeightSolution:
    if not strength >= 0:
        raise PatterningError(f"strength: got {strength}, expected a number >= 0; turn the target round instead")
    reached, limit = largest
    dual, residual, iterations = np.zeros(len(posed.beta)), np.inf, 0
    if strength <= limit * (1 + SLACK):
        strength = min(strength, reached)
        dual, residual, iterations = posed.solve(strength)
    (low, high), (minimum, maximum) = (posed.problem.low, posed.problem.high), posed.bounds
    if not residual <= SLACK:
        raise PatterningError(
            f"strength {strength:g} is out of reach with {posed.limits}: the largest feasible strength is "
            f"{reached:.6g}; lower the strength or widen weight_min and weight_max"
        )
    h = posed.problem.settled(posed.problem.intervention(dual))  # so that the mean weight is 1 to rounding
    num_samples, response = len(h), np.zeros(len(posed.problem.shards[0]))
    start = 0
    for chunk in chunks(posed.problem.shards):
        response += chunk @ h[start : start + chunk.shape[1]]
        start += chunk.shape[1]
    weights = np.clip(1.0 + h, minimum, maximum)
    size = float(weights.sum() ** 2 / (weights @ weights))
    top = -(-num_samples // 100)
    heaviest = np.partition(weights, num_samples - top)[num_samples - top :]
    return WeightSolution(
        weights=weights,
        strength=strength,
        largest_feasible_strength=reached,
        predicted_response=posed.inverse_temperature / num_samples * response,
        effective_sample_size=size,
        effective_sample_share=size / num_samples,
        top_percent_share=float(heaviest.sum() / weights.sum()),
        num_at_minimum=int(np.count_nonzero(h == low)),
        num_at_maximum=int(np.count_nonzero(h == high)),
        num_iterations=iterations,
        residual=residual,
    )
