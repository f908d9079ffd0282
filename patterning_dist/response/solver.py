"""From chi and a target response to sample weights rho = 1 + h within bounds.

chi is [observable, sample], as one array or as a list of column shards, arrays or ``.npy`` files (`response.columns`);
dmu = (n_beta / n) chi h. Shards in files are read piece by piece, a pass after the other, and are nowhere whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from patterning_dist.errors import PatterningError
from patterning_dist.response.bounded import Largest, Problem, largest_step, minimise
from patterning_dist.response.columns import Chi, Columns
from patterning_dist.response.grouped import GroupedProblem, pose_groups
from patterning_dist.response.heaviest import Heaviest
from patterning_dist.response.intervention import Inverse, Method, check_inputs
from patterning_dist.response.moments import Floats
from patterning_dist.response.strength import Reached, bracketed, newton

_SOFTEST = 1e12  # strength of a ridge whose weights are as far from 1 as the bounds allow
SLACK = 1e-6  # relative: a strength this far past the largest is rounding, and is brought back to it


@dataclass(frozen=True)
class _Posed:
    problem: Problem | GroupedProblem
    bounds: tuple[float, float]  # of rho; the maximum may be infinite, where problem.high never is
    beta: Floats  # dual: the constraint 1/n Q h = strength * beta
    inverse_temperature: float
    soft: bool
    sample: Floats  # observable sample: a part of the columns, none where they are few

    @property
    def limits(self) -> str:
        """What holds a strength back, for messages."""
        words = f"weights in [{self.bounds[0]:g}, {self.bounds[1]:g}]"
        if isinstance(self.problem, GroupedProblem):
            words += f" that keep the mass of {self.problem.num_groups} groups"
        return words

    @cached_property
    def near(self) -> _Posed | None:
        """The same of a sample of the columns, whose solutions all of them are looked for from; None: there are few."""
        if not self.sample.size:
            return None
        near = replace(self, problem=replace(self.problem, columns=Columns(self.sample)), sample=self.sample[:, :0])
        try:
            _ = near.largest
        except PatterningError:  # of all columns there may be more to say
            return None
        return near

    @cached_property
    def unbounded(self) -> Floats:
        """The dual point of strength 1 without bounds, whose h has sqrt(mean h^2) = |nu|."""
        bent = np.eye(len(self.beta)) + self.problem.penalty
        return np.asarray(np.linalg.solve(bent, self.beta), np.float64)

    @cached_property
    def largest(self) -> Largest:
        if self.soft:
            return Largest(np.inf, np.inf, np.inf, self.beta)
        return largest_step(self.problem, self.beta, None if self.near is None else self.near.largest.smooth)

    def at_strength(self, strength: float) -> Reached:
        """The solution of a strength within reach."""
        start = strength * self.unbounded
        if self.near is not None:
            start = self.near.at_strength(min(strength, self.near.largest.reached)).dual
        dual, found, steps = minimise(self.problem, strength * self.beta, start, np.eye(len(self.beta)))
        return Reached(strength, dual, found, steps)

    def at_size(self, size: float) -> Reached | None:
        """The solution whose sqrt(mean h^2) is `size`; None: all are smaller."""
        upper = self.largest.reached
        if self.largest.square < size**2:
            return None
        near = None if self.near is None else self.near.at_size(size)
        strength = size / float(np.linalg.norm(self.unbounded))
        start = (strength, strength * self.unbounded) if near is None else (near.strength, near.dual)
        found = newton(self.problem, self.beta, size, *start)
        if found is not None and found.strength <= upper:
            return found
        if self.soft:
            upper = strength
            while self.at_strength(upper).found.square < size**2:
                if upper > _SOFTEST:
                    return None
                upper *= 4
        return bracketed(self.problem, self.beta, size, upper, start[1])


@dataclass(frozen=True)
class WeightSolution:
    """Sample weights and what is predicted of them. Sums over samples; rho has mean 1."""

    strength: float
    largest_feasible_strength: float  # inf for ridge, which needs no strength to be met
    predicted_response: Floats  # observable: (n_beta / n) chi h
    effective_sample_size: float  # (sum rho)^2 / sum rho^2
    effective_sample_share: float
    top_percent_share: float  # of all weight, on the heaviest 1 % of samples
    num_at_minimum: int
    num_at_maximum: int
    num_iterations: int
    num_passes: int  # over all columns, with those for the largest strength and for what is said here
    residual: float  # largest miss of a constraint, relative to the largest wanted response
    _posed: _Posed = field(repr=False)
    _solved: Reached = field(repr=False)

    def parts(self) -> Iterator[Floats]:
        """The weights in pieces, in the order of the columns, computed again from chi."""
        for _, h in self._posed.problem.interventions(self._solved.dual, self._solved.found):
            yield np.clip(1.0 + h, *self._posed.bounds)

    @cached_property
    def weights(self) -> Floats:
        """All of them [sample]."""
        return np.concatenate(list(self.parts()))


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

    Examples:
        >>> from patterning_dist import solve_weights
        >>> chi = np.array([[-0.2, 0.0, 0.2]])  # of phi to three samples
        >>> solution = solve_weights(chi, target=[-0.1], inverse_temperature=3.0)
        >>> solution.weights.round(2)  # phi is to go down by 0.1: sample 0, with chi < 0, is weighted up
        array([1.25, 1.  , 0.75])
        >>> solution.predicted_response.round(3)
        array([-0.1])
    """
    inverse = Inverse(method, ridge, rank, mode)
    posed = _pose(chi, target, inverse, inverse_temperature, weight_min, weight_max, observables, groups)
    if not strength >= 0:
        raise PatterningError(f"strength: got {strength}, expected a number >= 0; turn the target round instead")
    reached, limit = posed.largest.reached, posed.largest.limit
    if strength > limit * (1 + SLACK):
        raise _out_of_reach(posed, strength)
    return _solution(posed, posed.at_strength(min(strength, reached)))


def largest_feasible_strength(chi: Chi, target: ArrayLike, **options: Any) -> float:
    """max a such that a * target can be reached within the bounds; `options` as for `solve_weights` but
    strength.

    Reached by an actual h, and within 1e-7 (relative) of the linear programming bound.

    Examples:
        >>> from patterning_dist import largest_feasible_strength
        >>> chi = np.array([[-0.2, 0.0, 0.2]])
        >>> largest = largest_feasible_strength(chi, [-0.1], inverse_temperature=3.0)
        >>> round(largest, 3)  # phi can go down by 6 * 0.1, with all weight on sample 0
        6.0
    """
    return _pose_from_options(chi, target, options).largest.reached


def share_at_strength(share: float, strength: float) -> float:
    """Effective sample share of 1 + s h, 1 / (1 + s^2 (1 / share - 1)), where 1 + h of mean 1 has ``share``.

    Examples:
        >>> share_at_strength(0.5, strength=0.5)  # a milder step leaves more samples to train on
        0.8
    """
    return 1 / (1 + strength**2 * (1 / share - 1))


def solve_for_effective_sample_share(chi: Chi, target: ArrayLike, share: float, **options: Any) -> WeightSolution:
    """The solution whose strength makes (sum rho)^2 / (n sum rho^2) = share; `options` as for
    `solve_weights`.

    |h| grows with the strength, so the share falls from 1 to that of the largest feasible strength. Raises
    PatterningError for a share outside (0, 1) or below what the bounds (or the ridge) allow, naming the
    smallest.

    Examples:
        >>> from patterning_dist import solve_for_effective_sample_share
        >>> chi = np.array([[-0.2, 0.0, 0.2]])
        >>> solution = solve_for_effective_sample_share(chi, [-0.1], 0.8, inverse_temperature=3.0)
        >>> solution.weights.round(2), round(solution.effective_sample_size, 2)  # as good as 0.8 * 3 samples
        (array([1.61, 1.  , 0.39]), 2.4)
    """
    if not 0 < share < 1:
        raise PatterningError(f"effective sample share: got {share}, expected between 0 and 1 (1 is no intervention)")
    posed = _pose_from_options(chi, target, options)
    wanted = np.sqrt(1 / share - 1)
    solved = posed.at_size(wanted)
    if solved is None:
        smallest = posed.at_strength(_SOFTEST).found.square if posed.soft else posed.largest.square
        raise PatterningError(
            f"effective sample share: {share:g} is below {1 / (1 + smallest):.4g}, the smallest with "
            f"{posed.limits}; ask for a larger share or widen weight_min and weight_max"
        )
    return _solution(posed, solved)


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
    columns, target = check_inputs(chi, target, inverse_temperature)
    if not weight_min < 1 < weight_max:
        raise PatterningError(f"weight bounds: got [{weight_min}, {weight_max}], expected weight_min < 1 < weight_max")
    if groups is None:
        means, covariance, sample = columns.survey()
    else:
        labels, means, covariance = pose_groups(columns, groups)
        sample = np.empty((columns.num_rows, 0))  # which would hold too little of small groups
    directions, variances = inverse.directions(covariance, target, observables)
    turn = directions / np.sqrt(variances)[:, None]
    beta = turn @ target / inverse_temperature
    if not beta.any():
        raise PatterningError("target: asks for no response in the directions kept; give one that is not zero")
    penalty = np.zeros((len(beta), len(beta)))
    if inverse.ridge is not None:
        penalty = inverse.ridge / columns.num_samples * (turn @ turn.T)
    low = weight_min - 1.0
    # With mean 1 no weight can pass this, so an infinite maximum needs no other treatment.
    high = min(weight_max - 1.0, -low * max(columns.num_samples - 1, 1))
    problem: Problem | GroupedProblem
    if groups is None:  # one multiplier, for the sum, beside those of the directions
        beta, penalty = np.append(beta, 0.0), np.pad(penalty, (0, 1))
        problem = Problem(columns, means, turn, penalty, low, high)
    else:
        problem = GroupedProblem(columns, labels, means, turn, penalty, low, high, np.zeros(means.shape[1]))
    return _Posed(problem, (weight_min, weight_max), beta, inverse_temperature, inverse.ridge is not None, sample)


def _out_of_reach(posed: _Posed, strength: float) -> PatterningError:
    return PatterningError(
        f"strength {strength:g} is out of reach with {posed.limits}: the largest feasible strength is "
        f"{posed.largest.reached:.6g}; lower the strength or widen weight_min and weight_max"
    )


def _solution(posed: _Posed, solved: Reached) -> WeightSolution:
    wanted = solved.strength * posed.beta
    residual = float(np.abs(solved.found.gradient - wanted).max() / max(np.abs(wanted).max(), 1e-300))
    if not residual <= SLACK:
        raise _out_of_reach(posed, solved.strength)
    problem, columns = posed.problem, posed.problem.columns
    largest, number = posed.largest.reached, columns.num_samples
    response, total, squares, at_minimum, at_maximum = np.zeros(columns.num_rows), 0.0, 0.0, 0, 0
    heaviest = Heaviest(-(-number // 100))
    for piece, h in problem.interventions(solved.dual, solved.found):
        weights = np.clip(1.0 + h, *posed.bounds)
        response += piece @ h
        total, squares = total + float(weights.sum()), squares + float(weights @ weights)
        at_minimum += int(np.count_nonzero(h == problem.low))
        at_maximum += int(np.count_nonzero(h == problem.high))
        heaviest.add(weights)
    solution = WeightSolution(
        strength=solved.strength,
        largest_feasible_strength=largest,
        predicted_response=posed.inverse_temperature / number * response,
        effective_sample_size=total**2 / squares,
        effective_sample_share=total**2 / squares / number,
        top_percent_share=heaviest.total() / total,
        num_at_minimum=at_minimum,
        num_at_maximum=at_maximum,
        num_iterations=solved.num_iterations,
        num_passes=columns.num_passes,
        residual=residual,
        _posed=posed,
        _solved=solved,
    )
    if columns.in_memory:
        _ = solution.weights  # at once, for its owner may change chi
    return solution
