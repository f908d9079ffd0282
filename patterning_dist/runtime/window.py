"""Windows walked on workers: where every arm's training leads from its checkpoint, and what is observed there."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch

from patterning_dist.config import PredictConfig, SamplingConfig, TrainingConfig
from patterning_dist.data.sampler import epoch_batch
from patterning_dist.models.components import Vector, axpy
from patterning_dist.progress import Progress
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.chains.groups import chain_workers
from patterning_dist.runtime.chains.workers import MakeStudy, Result
from patterning_dist.runtime.environment import ray_session
from patterning_dist.runtime.tasks import Task, digest, run_tasks
from patterning_dist.runtime.workforce import Workforce
from patterning_dist.sampling.target import Target
from patterning_dist.sampling.window import Move, Rule, metric, window_moves
from patterning_dist.storage.run import RunDirectory
from patterning_dist.tasks.held_out import signed_sums
from patterning_dist.tasks.task import Task as LearningTask

_BATCH_STREAM = 0x77696E64  # added to the seed: batches that are no arm's own
# Beyond it the flow along the most negative curvature has grown e^1.5 times, and no first order holds.
LARGEST_GROWTH = 1.5
DEFAULT_CLIPPING = 1.0  # of DeepSpeed
_FEWEST_BATCHES = 60  # of a second moment


class Windowed(Protocol):
    """What a worker needs of the subjects of an experiment."""

    task: LearningTask
    seed: int

    def target(self, name: str) -> Target: ...


@dataclass(frozen=True)
class Window:
    """How long arms are trained, by what, and how that is predicted.

    Attributes:
        training: section of the experiment.
        tau: sum of the schedule's factors over the steps.
        clipping: norm that gradients are clipped to; 0: they are not.
        settings: section of the experiment.
    """

    training: TrainingConfig
    tau: float
    clipping: float
    settings: PredictConfig

    def growth(self, move: Move) -> float:
        """Exponent of what the flow grows by along the most negative curvature that a move has met."""
        return -self.tau * move.smallest


def walk_windows(
    opener: MakeStudy,
    sampling: SamplingConfig,
    device: str,
    run: RunDirectory,
    window: Window,
    inputs: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Result]:
    """Walk the windows of subjects, in one step and in two.

    Args:
        opener: opens the subjects in a worker; the component of each is all that its training moves.
        sampling: section of the experiment.
        device: of the workers.
        run: holds the results: what an earlier driver got done is kept.
        window: that is walked.
        inputs: subject -> JSON of hashes of all that its result follows from besides.
        progress: shows the subjects done.

    Returns:
        Subject -> ``parts`` float64 [steps taken, observable, sample, sign]: what each held-out sample adds to an
        observable with coefficients above and below 0, empty where ``growth``, the exponent of what the flow grows by
        along the most negative curvature met, is beyond ``LARGEST_GROWTH``.
    """
    grouped = sampling.ranks_per_chain > 1
    settings = [
        window.training.model_dump(mode="json"),
        window.tau,
        window.clipping,
        window.settings.model_dump(mode="json"),
        device,
    ]
    with contextlib.ExitStack() as resources:

        @cache  # Ray starts when the first task that is not done needs it
        def workers(number: int) -> Workforce:
            resources.enter_context(ray_session(sampling.threads_per_worker))
            return resources.enter_context(chain_workers(opener, sampling, device, number, progress))

        def task(name: str) -> Task:
            def start(worker: ActorHandle, board: ActorHandle) -> Any:
                if grouped:
                    return worker.everywhere.remote(f"in {name}", _walk, name, window)
                return worker.__ray_call__.remote(_walk, name, window)

            return Task(name, f"{name}.npz", digest({}, {"inputs": inputs[name], "settings": settings}), start)

        tasks = [task(name) for name in inputs]
        found = run_tasks(tasks, run, workers, progress, "walking the windows", what="windows")
    return dict(zip(inputs, found, strict=True))


def _walk(worker: Any, name: str, window: Window) -> Result:
    """The whole window in one step, then in two halves of which the second has fresh gradients and curvature."""
    subjects: Windowed = worker.study
    target = subjects.target(name)
    rules = _rules(subjects, target, window.training)
    begin = {key: w.clone() for key, w in target.live().items()}
    whole, half = _moves(subjects, target, rules, window, [window.tau, window.tau / 2])
    moves, parts = [whole], []
    if window.growth(whole) <= LARGEST_GROWTH:
        target.place(axpy(1.0, whole.vector, begin))
        parts.append(_parts(target))
        middle = axpy(1.0, half.vector, begin)
        target.place(middle)
        moves += _moves(subjects, target, rules, window, [window.tau / 2])
        if window.growth(moves[-1]) <= LARGEST_GROWTH:
            target.place(axpy(1.0, moves[-1].vector, middle))
            parts.append(_parts(target))
        target.place(begin)
    return {
        "parts": np.stack(parts) if len(parts) == 2 else np.zeros(0),
        "growth": np.array(max(window.growth(move) for move in moves)),
    }


def _rules(subjects: Windowed, target: Target, training: TrainingConfig) -> dict[str, Rule]:
    """What the task's own optimizer does with every piece."""
    model = target.model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of_parameter: dict[str, Rule] = {}
    for group in subjects.task.optimizer(model, training).param_groups:
        rule = Rule(group["lr"], group["weight_decay"], group.get("eps"))
        of_parameter |= {names[id(parameter)]: rule for parameter in group["params"]}
    return {piece.name: of_parameter[piece.parameter] for piece in target.component.pieces}


def _moves(
    subjects: Windowed, target: Target, rules: Mapping[str, Rule], window: Window, taus: list[float]
) -> list[Move]:
    """From where the target is: gradient and second moment from the same minibatches, then products on a part of them.

    On samples that the second moment has not seen, weights of rare tokens would have curvature and hardly a moment, so
    that their rate, and with it the growth, has no bound. Minibatch gradients are clipped as the training clips them;
    curvature then counts for the mean factor.
    """
    settings, batch_size, population = window.settings, window.training.batch_size, len(subjects.task.train)
    num_batches = max(_FEWEST_BATCHES, -(-settings.gradient_sequences // batch_size))
    mean = {key: torch.zeros_like(w) for key, w in target.live().items()}
    squares, kept = {key: torch.zeros_like(w) for key, w in mean.items()}, 0.0
    batches = [epoch_batch(subjects.seed + _BATCH_STREAM, n, batch_size, population) for n in range(num_batches)]
    for ids in batches:
        _, gradient = target.gradient(ids)
        norm = target.dot(gradient, gradient) ** 0.5
        factor = min(1.0, window.clipping / norm) if window.clipping and norm else 1.0
        kept += factor / num_batches
        for key, g in gradient.items():
            mean[key] += factor * g / num_batches
            squares[key] += (factor * g) ** 2 / num_batches
    rates, decays = metric(rules, squares)
    seen = np.concatenate(batches)
    samples = target.prepare(target.data, seen[:: max(1, len(seen) // settings.curvature_sequences)])

    def product(vector: Vector) -> Vector:
        curved = target.hessian_product(samples, vector)
        return {key: kept * curved[key] + decays[key] * v for key, v in vector.items()}

    pull = {key: decays[key] * w for key, w in target.live().items()}
    return window_moves(product, axpy(1.0, mean, pull), rates, target.dot, taus=taus, num_steps=settings.lanczos_steps)


def _parts(target: Target) -> np.ndarray:
    """What every held-out sample adds to every observable [observable, sample, sign]."""
    assert target.held_out is not None and target.coefficients is not None
    return signed_sums(target.coefficients.double(), target.losses(target.held_out))
