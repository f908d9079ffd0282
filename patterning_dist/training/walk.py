"""A window walked: where a training leads from its checkpoint, segment by segment, and what is observed there.

Every segment begins with a gradient, a second moment and curvature of its own, of minibatches that no other has, and
with the optimizer's state where the last one has left it, and is walked in closed form (see ``sampling.window``). The
window is walked twice, in half of ``segments`` and in all of them: what the two ends differ by is what the closed form
leaves out, and what other minibatches would have said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from patterning_dist.config import PredictConfig, TrainingConfig
from patterning_dist.data.sampler import epoch_batch
from patterning_dist.errors import PatterningError
from patterning_dist.models.components import Vector, axpy
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.steps import Steps
from patterning_dist.sampling.target import Target
from patterning_dist.sampling.window import Rule, metric, second_moments, window_move, window_spread
from patterning_dist.tasks.held_out import signed_sums
from patterning_dist.tasks.task import Task

_BATCH_STREAM = 0x77696E64  # added to the seed: batches that are no arm's own
# Beyond it the flow of a segment has grown e^1.5 times along its most negative curvature, and no first order holds. A
# segment, not the window: see benchmarks/README.md, windows.py.
LARGEST_GROWTH = 1.5
DEFAULT_CLIPPING = 1.0  # of DeepSpeed
_FEWEST_BATCHES = 60  # of a second moment
NUM_SPREAD = 4  # draws of where the noise of minibatches leads to
_SPREAD_STREAM = 0x73707264


class Windowed(Protocol):
    """What is needed of the subjects of an experiment."""

    task: Task
    seed: int
    ranks: Ranks

    def target(self, name: str) -> Target: ...


@dataclass(frozen=True)
class Window:
    """How long arms are trained, by what, and how that is predicted.

    Attributes:
        training: section of the experiment.
        factors: of the schedule, one a step of the optimizer.
        clipping: norm that gradients are clipped to; 0: they are not.
        settings: section of the experiment.
    """

    training: TrainingConfig
    factors: tuple[float, ...]
    clipping: float
    settings: PredictConfig

    @property
    def tau(self) -> float:
        """Sum of the schedule's factors."""
        return sum(self.factors)

    @property
    def walks(self) -> tuple[int, int]:
        """Segments of the coarser and of the finer walk, none of them without a step."""
        fine = min(self.settings.segments, len(self.factors))
        return max(1, fine // 2), fine

    @property
    def num_batches(self) -> int:
        """Minibatches of the gradient of one segment."""
        return max(_FEWEST_BATCHES, -(-self.settings.gradient_sequences // self.training.batch_size))

    @property
    def num_samples(self) -> int:
        """Training samples, counted as often as they come, of the finer walk."""
        return self.walks[1] * self.num_batches * self.training.batch_size

    @property
    def num_segments(self) -> int:
        """Segments of both walks."""
        return sum(self.walks)


class State(NamedTuple):
    """Of the optimizer, 0 where it is fresh: m, and what its second moments begin with (see ``sampling.window``)."""

    momentum: Vector
    squares: Vector


def walk(subjects: Windowed, name: str, window: Window) -> dict[str, Any]:
    """Walk the window of a subject in half of the segments and in all of them; every rank of a chain group calls this.

    Returns:
        ``parts`` float64 [walk, observable, sample, sign], what each held-out sample adds to an observable with
        coefficients above and below 0; ``spread`` [draw, observable], how far the noise of minibatches takes a training
        from there, in draws that are the same for all subjects; ``metrics`` [walk, metric], those of the task, their
        ``names`` and ``metric_spread`` [draw, metric]; ``growth`` [segment], the exponent of what the flow grows by in
        it along the most negative curvature met. Where one is beyond ``LARGEST_GROWTH``, all but it are empty.
    """
    target = subjects.target(name)
    target.weight_decay = 0.0  # the rules have that of the training
    rules, momentum = _rules(subjects, target, window.training)
    begin = {key: w.clone() for key, w in target.live().items()}
    fresh = {key: torch.zeros_like(w) for key, w in begin.items()}
    growth, parts, metrics = list[float](), list[np.ndarray](), list[dict[str, float]]()
    around, metrics_around = list[np.ndarray](), list[dict[str, float]]()
    for walk_number, segments in enumerate(window.walks):
        state, bounds = State(fresh, fresh), np.linspace(0, len(window.factors), segments + 1).round().astype(int)
        for number, (start, stop) in enumerate(pairwise(bounds.tolist()), walk_number * window.walks[0]):
            steps = Steps(np.array(window.factors[start:stop]), start, momentum)
            taken = _segment(subjects, target, rules, window, number, steps, state)
            growth.append(-float(steps.factors.sum()) * taken.smallest)
            if growth[-1] > LARGEST_GROWTH:
                break
            state = taken.state
            target.move_to(axpy(1.0, taken.vector, target.live()))
        else:
            parts.append(_parts(target))
            metrics.append(subjects.task.evaluate(target.model, subjects.ranks))
            middle = {key: w.clone() for key, w in target.live().items()}
            for draw in taken.draws:
                target.move_to(axpy(1.0, draw, middle))
                around.append(_parts(target).sum(axis=(1, 2)))
                metrics_around.append(subjects.task.evaluate(target.model, subjects.ranks))
        target.move_to(begin)
    if len(parts) < 2:
        empty = dict.fromkeys(("parts", "spread", "metrics", "metric_spread"), np.zeros(0))
        return {**empty, "names": [], "growth": np.array(growth)}
    values = np.array([list(found.values()) for found in metrics])
    return {
        "parts": np.stack(parts),
        "spread": np.stack(around) - parts[-1].sum(axis=(1, 2)),
        "metrics": values,
        "metric_spread": np.array([list(found.values()) for found in metrics_around]) - values[-1],
        "names": list(metrics[0]),
        "growth": np.array(growth),
    }


def _rules(subjects: Windowed, target: Target, training: TrainingConfig) -> tuple[dict[str, Rule], float]:
    """What the task's own optimizer does with every piece, and its momentum, which is that of all.

    Raises:
        PatterningError: there are several.
    """
    model = target.model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of_parameter, momenta = dict[str, Rule](), set[float]()
    for group in subjects.task.optimizer(model, training).param_groups:
        momentum, memory = group.get("betas", (0.0, 0.0))
        momenta.add(momentum)
        rule = Rule(group["lr"], group["weight_decay"], group.get("eps"), memory)
        of_parameter |= {names[id(parameter)]: rule for parameter in group["params"]}
    if len(momenta) > 1:
        raise PatterningError(
            f"predict: groups of the task's optimizer have momenta {sorted(momenta)}, and a window has one; give all "
            "groups the same first beta, or leave out the section predict"
        )
    return {piece.name: of_parameter[piece.parameter] for piece in target.component.pieces}, momenta.pop()


class _Segment(NamedTuple):
    """One segment walked."""

    vector: Vector
    state: State
    smallest: float  # Ritz value
    draws: list[Vector]  # in the last one, where the noise of its minibatches leads to in the whole window


def _segment(
    subjects: Windowed,
    target: Target,
    rules: Mapping[str, Rule],
    window: Window,
    segment: int,
    steps: Steps,
    state: State,
) -> _Segment:
    """From where the target is: gradient and second moment from the same minibatches, then products on a part of them.

    On samples that the second moment has not seen, weights of rare tokens would have curvature and hardly a moment, so
    that their rate, and with it the growth, has no bound. Minibatch gradients are clipped as the training clips them;
    curvature then counts for the mean factor.
    """
    settings, batch_size, population = window.settings, window.training.batch_size, len(subjects.task.train)
    mean = {key: torch.zeros_like(w) for key, w in target.live().items()}
    squares, kept = {key: torch.zeros_like(w) for key, w in mean.items()}, 0.0
    shares = _noise_shares(subjects.seed, window.num_batches if segment == window.num_segments - 1 else 0)
    noise = [{key: torch.zeros_like(w) for key, w in mean.items()} for _ in shares]
    numbers = range(segment * window.num_batches, (segment + 1) * window.num_batches)
    batches = [epoch_batch(subjects.seed + _BATCH_STREAM, n, batch_size, population) for n in numbers]
    for number, ids in enumerate(batches):
        _, gradient = target.gradient(ids)
        norm = target.dot(gradient, gradient) ** 0.5
        factor = min(1.0, window.clipping / norm) if window.clipping and norm else 1.0
        kept += factor / len(batches)
        for key, g in gradient.items():
            mean[key] += factor * g / len(batches)
            squares[key] += (factor * g) ** 2 / len(batches)
            for share, drawn in zip(shares, noise, strict=True):
                drawn[key] += share[number] * factor * g
    moments, squares = second_moments(rules, squares, state.squares, steps)
    rates, decays = metric(rules, moments)
    seen = np.concatenate(batches)
    samples = target.prepare(target.data, seen[:: max(1, len(seen) // settings.curvature_sequences)])

    def product(vector: Vector) -> Vector:
        curved = target.hessian_product(samples, vector)
        return {key: kept * curved[key] + decays[key] * v for key, v in vector.items()}

    pull = {key: decays[key] * w for key, w in target.live().items()}
    gradient, num_products = axpy(1.0, mean, pull), settings.lanczos_steps
    move = window_move(product, gradient, state.momentum, rates, target.dot, steps, num_products)
    whole, a_pass = Steps(np.array(window.factors), 0, steps.momentum), population / batch_size
    draws = [window_spread(product, drawn, rates, target.dot, whole, a_pass, num_products) for drawn in noise]
    return _Segment(move.vector, State(move.momentum, squares), move.smallest, draws)


def _noise_shares(seed: int, num_batches: int) -> list[list[float]]:
    """Orthonormal rows that add up to 0 [draw, batch]: sums of gradients with them have a minibatch's covariance."""
    if not num_batches:
        return []
    normal = np.random.default_rng([seed, _SPREAD_STREAM]).normal(size=(num_batches, NUM_SPREAD + 1))
    normal[:, 0] = 1.0
    return np.linalg.qr(normal)[0].T[1:].tolist()


def _parts(target: Target) -> np.ndarray:
    """What every held-out sample adds to every observable [observable, sample, sign]."""
    assert target.held_out is not None and target.coefficients is not None
    return signed_sums(target.coefficients.double(), target.losses(target.held_out))
