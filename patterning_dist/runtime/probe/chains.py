"""Pieces of chains and of scoring, timed at their real sizes in as many processes at once as the run uses."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch

from patterning_dist.config import SamplingConfig
from patterning_dist.config.response import DirectionConfig
from patterning_dist.errors import PatterningError
from patterning_dist.response.cost import Seconds
from patterning_dist.runtime.chains.attempt import MakeStudy
from patterning_dist.runtime.probe.ranks import ProbeGroup, probe_groups
from patterning_dist.runtime.resources import sampling_resources
from patterning_dist.sampling.chain import ChainFailure
from patterning_dist.sampling.direction import directional_losses, response_direction
from patterning_dist.sampling.target import Target
from patterning_dist.training.walk import Window

# Seconds: how long the steps of one component are timed, and how long a process may take for anything at all.
_STEPS_BUDGET = 2.5
_TIMEOUT = 600.0
_MIN_STEPS, _MAX_STEPS, _BLOCKS = 2, 24, 3
_SCORED = 128  # samples of the pool that scoring is timed on


@dataclass(frozen=True)
class ChainTimes:
    """One subject's chains on one process.

    Attributes:
        opening: from the open subjects to a chain at its first step.
        step: of the sampler.
        draw: measuring all losses.
        gradients: of the split losses, at a draw; nothing where they are not taken.
        num_coordinates: free coordinates of the component.
        weight_bytes, gradient_bytes, state_bytes, activation_bytes: of the largest rank.
    """

    opening: Seconds
    step: Seconds
    draw: Seconds
    gradients: Seconds
    num_coordinates: int
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class SolveTimes:
    """Of the response-direction estimator.

    Attributes:
        opening: from the open subjects to a target; every task begins with it.
        product: one Hessian-vector product.
        num_products: conjugate gradients took at the probe's checkpoint.
        prepare, direction: one sample of the pool, and its losses along one direction.
    """

    opening: Seconds
    product: Seconds
    num_products: int
    prepare: Seconds
    direction: Seconds


@dataclass(frozen=True)
class WindowTimes:
    """Of the walk of a window.

    Attributes:
        opening: from the open subjects to a target.
        gradient, product: of one minibatch; one Hessian-vector product.
        evaluation: of the split losses and the task's metrics where a walk ends.
    """

    opening: Seconds
    gradient: Seconds
    product: Seconds
    evaluation: Seconds


@dataclass(frozen=True)
class ChainProbe:
    """All that was measured on the chain workers; ``process_bytes`` is the largest memory of any of them."""

    num_workers: int
    starting: Seconds
    chains: dict[str, ChainTimes]
    solve: SolveTimes | None
    window: WindowTimes | None
    process_bytes: int


def probe_chains(
    opener: MakeStudy,
    sampling: SamplingConfig,
    device: str,
    subjects: dict[str, bool],
    num_tasks: int,
    solve: tuple[str, DirectionConfig] | None = None,
    window: tuple[Any, Window] | None = None,
) -> ChainProbe:
    """Time the pieces of chains, and of solving, on all workers at once.

    Args:
        opener: opens the subjects in a worker.
        sampling: section of the experiment.
        device: of the workers.
        subjects: sets of chains to be timed, and whether gradients are taken at every draw of them.
        num_tasks: chains of the whole run.
        solve: subject whose response directions are solved for, and how; None: they are not.
        window: subject whose window is walked, and how; None: none is.

    Raises:
        PatterningError: the cluster cannot hold one chain, or the subjects cannot be opened.
    """
    need = sampling_resources(sampling, device, sampling.ranks_per_chain)
    number = need.at_once(num_tasks, sampling.workers).number
    started = time.monotonic()
    with probe_groups(
        [[need.options] * need.num_ranks] * number, device, sampling.threads_per_worker, _TIMEOUT
    ) as groups:
        run_together(groups, _open, opener)
        starting = time.monotonic() - started
        measured = {
            subject: _joined(run_together(groups, _time_chain, subject, sampling.batch_size, gradients))
            for subject, gradients in subjects.items()
        }
        solving = None if solve is None else _joined_solve(run_together(groups, _time_solve, *solve))
        walking = None if window is None else _measured(run_together(groups, _time_window, *window))
        memory = run_together(groups, process_bytes)
    windows = None if walking is None else WindowTimes(**walking)
    return ChainProbe(number, Seconds.about(starting, 0.25), measured, solving, windows, max(memory))


def run_together(groups: list[ProbeGroup], function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(rank, *arguments)`` on every rank of every group at once; all results.

    Raises:
        PatterningError: no answer in time.
    """
    calls = [call for group in groups for call in group.begin(function, *arguments)]
    try:
        return ray.get(calls, timeout=_TIMEOUT)
    except ray.exceptions.GetTimeoutError:
        raise PatterningError(
            f"the probe: {function.__name__.strip('_')} had no answer within {_TIMEOUT:g} s; the model is too large "
            "for these processes, or they wait for each other: try `patterning doctor`"
        ) from None


def _open(rank: Any, opener: MakeStudy) -> None:
    rank.subjects = opener(rank.device, rank.ranks)


def _seconds(rank: Any, call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    if rank.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _time_chain(rank: Any, subject: str, batch_size: int, gradients: bool) -> dict[str, Any]:
    chains = []
    # Burn-in is left out, and with it, as in every changed chain, what a whole run records besides.
    changes = {"burn_in": 0, "num_draws": _BLOCKS + 1, "steps_between_draws": 1}
    opening = _seconds(rank, lambda: chains.append(rank.subjects.chain(subject, 0, **changes)))
    chain = chains[0]
    target, ids = chain.target, np.arange(batch_size)
    activations = SavedBytes(target.live().values())
    with activations.watch():
        target.gradient(ids)
    gradient = _seconds(rank, lambda: target.gradient(ids))
    measuring = min(_seconds(rank, target.measure) for _ in range(2))
    splitting = _seconds(rank, target.split_gradients) if gradients else 0.0
    # The same number on all ranks of a group, for they step together.
    num_steps = int(_agreed(min(max(_STEPS_BUDGET / _BLOCKS / gradient, _MIN_STEPS), _MAX_STEPS)))
    chain.settings = replace(chain.settings, steps_between_draws=num_steps)
    steps: list[float] = []
    try:
        draws, before = chain.draws(), None
        for _ in draws:
            now = time.perf_counter()
            if before is not None:
                steps.append((now - before - measuring) / num_steps)
            before = time.perf_counter()
    except ChainFailure:  # a fresh model is no place of rest; what was timed until then counts
        steps = steps or [1.2 * gradient]
    return {
        "opening": opening,
        "steps": steps,
        "draw": measuring,
        "gradients": splitting,
        "num_coordinates": chain.num_coordinates,
        "weight_bytes": _weight_bytes(target),
        "gradient_bytes": _bytes(target.center),
        "state_bytes": sum(_bytes(v) for v in chain.state._asdict().values() if isinstance(v, dict)),
        "activation_bytes": activations.total,
    }


def _joined(results: list[dict[str, Any]]) -> ChainTimes:
    def largest(name: str) -> int:
        return max(r[name] for r in results)

    return ChainTimes(
        step=Seconds.measured([step for r in results for step in r["steps"]]),
        num_coordinates=results[0]["num_coordinates"],
        weight_bytes=largest("weight_bytes"),
        gradient_bytes=largest("gradient_bytes"),
        state_bytes=largest("state_bytes"),
        activation_bytes=largest("activation_bytes"),
        **{name: Seconds.measured([r[name] for r in results]) for name in ("opening", "draw", "gradients")},
    )


def _time_solve(rank: Any, subject: str, settings: DirectionConfig) -> dict[str, Any]:
    subjects = rank.subjects
    found: dict[str, Any] = {}
    opening = _seconds(rank, lambda: found.update(target=subjects.target(subject)))
    target, pool = found["target"], subjects.source(subject, "pool")
    batch = target.prepare(target.data, subjects.hessian_ids(settings.hessian_sequences))
    gradient = target.split_gradients()[0]

    def solve() -> None:
        found["solution"] = response_direction(
            target,
            subjects.posterior(subject),
            gradient,
            batch,
            max_iterations=settings.conjugate_gradient_iterations,
            tolerance=settings.tolerance,
        )

    solving, ids = _seconds(rank, solve), np.arange(min(_SCORED, len(pool)))
    num_products = max(found["solution"].num_iterations, 1)
    prepare = _seconds(rank, lambda: found.update(pool=target.prepare(pool, ids)))
    center = target.center
    directions = [
        _seconds(rank, lambda: directional_losses(target, found["pool"], center, center, step=1e-3)) for _ in range(2)
    ]
    return {
        "opening": opening,
        "product": solving / num_products,
        "num_products": num_products,
        "prepare": prepare / len(ids),
        "direction": sum(directions) / len(directions) / len(ids),
    }


def _joined_solve(results: list[dict[str, Any]]) -> SolveTimes:
    return SolveTimes(num_products=results[0]["num_products"], **_measured(results))


def _measured(results: list[dict[str, Any]]) -> dict[str, Seconds]:
    return {name: Seconds.measured([r[name] for r in results]) for name in results[0] if name != "num_products"}


def _time_window(rank: Any, subject: Any, window: Window) -> dict[str, float]:
    subjects, settings = rank.subjects, window.settings
    subjects.by_name["window"] = subject
    found: dict[str, Any] = {}
    opening = _seconds(rank, lambda: found.update(target=subjects.target("window")))
    target, ids = found["target"], np.arange(window.training.batch_size) % len(subjects.task.train)
    gradient = min(_seconds(rank, lambda: target.gradient(ids)) for _ in range(3))
    samples = target.prepare(target.data, np.arange(min(settings.curvature_sequences, len(subjects.task.train))))

    def evaluate() -> None:
        target.losses(target.held_out)
        subjects.task.evaluate(target.model, rank.ranks)

    return {
        "opening": opening,
        "gradient": gradient,
        "product": _seconds(rank, lambda: target.hessian_product(samples, target.center)),
        "evaluation": _seconds(rank, evaluate),
    }


def _agreed(value: float) -> float:
    """The smallest of a group's values."""
    smallest = torch.tensor(value)
    torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
    return smallest.item()


class SavedBytes:
    """Bytes that forward passes keep for the backward pass, the weights left out."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        self._seen = {w.untyped_storage().data_ptr() for w in weights}
        self.total = 0

    def watch(self) -> AbstractContextManager:
        """Forward passes inside count."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter) and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def process_bytes(rank: Any) -> int:
    """The largest memory that a process has held: of its GPU, or all of it."""
    if rank.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _weight_bytes(target: Target) -> int:
    """Of this rank's part of the model."""
    parts = [getattr(p, "to_local", lambda p=p: p)() for p in target.model.parameters()]
    return sum(p.numel() * p.element_size() for p in parts)
